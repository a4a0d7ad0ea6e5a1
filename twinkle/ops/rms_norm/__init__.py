"""The op `rms_norm`: its definition in plain torch, and its kernels."""
