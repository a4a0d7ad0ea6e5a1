"""Lead kernels through the rooms: what is registered is matched, planned and put in place."""
