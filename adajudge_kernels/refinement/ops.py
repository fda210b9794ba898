"""The refinement block's pieces, dispatched by backend; matrix products stay with torch."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from adajudge_kernels import backends
from adajudge_kernels.layout import SequenceLayout
from adajudge_kernels.refinement import reference

# Plain PyTorch is traced by torch.compile, so it is looked up here rather than imported during the call.
_KERNELS = {"reference": reference}


def _kernels(x: Tensor) -> ModuleType:
    return _KERNELS[backends.choose_backend(x.device).backend]


def residual_rms_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Residual addition and normalisation: ``u = x + update``, ``u / sqrt(mean(u^2) + eps) * weight``.

    Args:
        x: the residual stream, ``[T, d]``.
        update: what a sublayer adds to it, ``[T, d]``, or None.
        weight: ``[d]``.
        eps: added to the mean square.

    Returns:
        ``(u, RMSNorm(u))``, both ``[T, d]`` in the dtype of x; arithmetic in fp32.
    """
    return _kernels(x).residual_rms_norm(x, update, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the merged projection ``[T, 2f]``, gate first: ``[T, f]``."""
    return _kernels(gate_up).swiglu(gate_up)


def sequence_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, causal: bool = True
) -> Tensor:
    """Softmax attention inside each sequence of `layout`, scale ``1/sqrt(e)``.

    Args:
        query, key, value: ``[T, H, e]``.
        layout: where the tokens of each sequence lie; prompt-shared only with `causal`.
        causal: whether a token sees only itself and what is before it in its sequence.

    Returns:
        ``[T, H, e]`` in the dtype of query; zero at padding.

    Raises:
        ValueError: bidirectional attention over a prompt-shared layout, where a prompt's states would depend on
            which candidate reads them.
    """
    if layout.shares_prompts and not causal:
        raise ValueError(
            "causal=False came with a prompt-shared layout: the prompt would see its candidates' responses; "
            "expected causal attention, or a packed or padded layout"
        )
    return _kernels(query).sequence_attention(
        query, key, value, layout.query_ranges, layout.key_ranges, layout.max_length, causal
    )
