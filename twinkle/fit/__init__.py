"""Compatibility of an implementation with its target: parameters and attributes; nothing runs."""
