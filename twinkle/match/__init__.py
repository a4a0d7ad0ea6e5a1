"""Match: which classes, instances and functions a kernel is about, by name or by structure."""
