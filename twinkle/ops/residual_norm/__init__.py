"""The op `residual_norm`: its definition in plain torch, and its kernels."""
