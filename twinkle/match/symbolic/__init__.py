"""Runs Python source on symbols: what a function computes, as one term."""
