"""The op `causal_lm_loss`: its definition in plain torch, and its kernels."""
