"""Prove that a kernel can stand in for its target."""
