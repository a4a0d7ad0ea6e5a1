"""Kernels for steps inside a forward: the forward is rewritten where they stand, and asks at each call."""
