"""Gated expert combination: three view scores mixed by a router."""
