"""The embedded kernels, one folder an op; `reference.py` in it is the definition."""
