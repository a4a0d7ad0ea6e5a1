"""Kernels of the Hub: resolved, trusted, fetched, locked and imported."""
