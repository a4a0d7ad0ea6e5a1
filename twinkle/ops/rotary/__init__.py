"""The op `rotary`: its definition in plain torch, and its kernels."""
