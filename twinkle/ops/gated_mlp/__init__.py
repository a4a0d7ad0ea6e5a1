"""The op `gated_mlp`: its definition in plain torch, and its kernels."""
