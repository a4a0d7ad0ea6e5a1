"""Put kernels in place and take them out again."""
