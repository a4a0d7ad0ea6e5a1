"""Proofs: comparing a kernel with its original, and keeping the verdict."""
