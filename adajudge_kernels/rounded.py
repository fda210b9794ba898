"""Division in Triton's kernels, rounded to nearest: on NVIDIA GPUs ``/`` of fp32 may be two units in the last place away, which
is more than a mean of many numbers is off."""

import triton
import triton.language as tl


@triton.jit
def divided(a, b):
    """``a / b``; b is a tensor."""
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b  # of fp64, rounded to nearest anyhow
