"""The refinement block's pieces, dispatched by backend; matrix products stay with torch."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from adajudge_kernels import backends
from adajudge_kernels.arguments import check_float, check_layout, check_like
from adajudge_kernels.layout import SequenceLayout
from adajudge_kernels.refinement import reference

# Plain PyTorch is traced by torch.compile, so it is looked up here rather than imported during the call.
_KERNELS = {"reference": reference}


def _kernels(x: Tensor) -> ModuleType:
    return _KERNELS[backends.choose_backend(x.device, "refinement").backend]


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
    check_float("gate_up", gate_up, 2, "[T, 2f]")
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up: shape {tuple(gate_up.shape)} came, expected [T, 2f], an even last dimension"
        )
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
        ValueError: an argument of the wrong shape, dtype or device; bidirectional attention over a prompt-shared
            layout, where a prompt's states would depend on which candidate reads them.
    """
    check_layout(layout)
    check_float("query", query, 3, "[T, H, e]")
    if query.shape[0] != layout.num_tokens:
        raise ValueError(
            f"query: shape {tuple(query.shape)} came, expected [{layout.num_tokens}, H, e] for this layout"
        )
    check_like("key", key, tuple(query.shape), query, "query")
    check_like("value", value, tuple(query.shape), query, "query")
    if layout.shares_prompts and not causal:
        raise ValueError(
            "causal=False came with a prompt-shared layout: the prompt would see its candidates' responses; "
            "expected causal attention, or a packed or padded layout"
        )
    return _kernels(query).sequence_attention(
        query, key, value, layout.query_ranges, layout.key_ranges, layout.max_length, causal
    )
