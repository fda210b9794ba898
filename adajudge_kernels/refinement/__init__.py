"""The fused pieces of a refinement block."""
