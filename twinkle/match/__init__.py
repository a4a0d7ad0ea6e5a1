"""Match: which classes, instances and functions a kernel is about, by name or by the structure of the code."""
