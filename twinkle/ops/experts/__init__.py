"""The op `experts`: its definition in plain torch, and its kernels."""
