"""The op `layer_norm`: its definition in plain torch, and its kernels."""
