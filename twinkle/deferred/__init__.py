"""The loss of causal language models without their logits, which are computed when they are read."""
