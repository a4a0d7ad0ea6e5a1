"""The op `qk_norm_rotary`: its definition in plain torch, and its kernels."""
