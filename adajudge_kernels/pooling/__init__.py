"""Pooling family: one scan over a sequence's tokens, several views."""
