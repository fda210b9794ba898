"""Other people's attention, for the layouts that it serves: packed sequences on a GPU, in bf16 or fp16.

The attention of this package serves every layout with the same bits. A library may be faster where nothing is shared; which
is so differs from GPU to GPU, hence it is measured (``python -m adajudge_kernels.tune``) or forced, never assumed: by
`use_attention` or the environment variable ``ADAJUDGE_ATTENTION``. A library's bits differ from ours, so with one chosen a
sequence's score may change in its last bits between a packed and a prompt-shared batch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adajudge_kernels.backends import Choice
from adajudge_kernels.layout import SequenceLayout
from adajudge_kernels.measurements import measured_names

ATTENTION_VARIABLE = "ADAJUDGE_ATTENTION"
OWN = "adajudge"


class Library(NamedTuple):
    """A function for packed sequences, and the widest head that it serves."""

    module: str
    function: str
    most_features: int


LIBRARIES = {
    "flash-attn-4": Library("flash_attn.cute", "flash_attn_varlen_func", 128),
    "flash-attn-3": Library("flash_attn_interface", "flash_attn_varlen_func", 256),
    "flash-attn-2": Library("flash_attn", "flash_attn_varlen_func", 256),
    "torch-varlen": Library("torch.nn.attention.varlen", "varlen_attn", 256),
}

_forced: str | None = None


def use_attention(name: str) -> AbstractContextManager[None]:
    """Force whose attention runs inside sequences in the block, in all threads of the process (whose blocks must nest).

    Args:
        name: ``"adajudge"``, or a library: ``"flash-attn-4"``, ``"flash-attn-3"``, ``"flash-attn-2"``,
            ``"torch-varlen"``. A call that it cannot serve raises a ValueError.

    Raises:
        ValueError: it is unknown or not installed.
    """
    reason = unavailable_reason(name)
    if reason is not None:
        raise ValueError(f"attention {name!r} cannot be used: {reason}")
    return _forcing(name)


@contextmanager
def _forcing(name: str) -> Iterator[None]:
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@functools.cache
def unavailable_reason(name: str) -> str | None:
    """Why a library cannot be used in this process, or None if it can."""
    if name == OWN:
        return None
    if name not in LIBRARIES:
        return f"unknown; expected one of {', '.join((OWN, *LIBRARIES))}"
    try:
        _function(name)
    except (ImportError, AttributeError) as error:
        return f"not installed, or not for this torch ({type(error).__name__}: {error})"
    return None


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    library = LIBRARIES[name]
    if importlib.util.find_spec(library.module.partition(".")[0]) is None:
        raise ImportError(f"no module {library.module}")
    return getattr(importlib.import_module(library.module), library.function)


def is_deterministic(name: str) -> bool:
    """Whether a library's backward can be asked to give the same bits in every run, or has been by a flag of torch."""
    asked = torch.are_deterministic_algorithms_enabled() and name == "torch-varlen"
    return asked or "deterministic" in inspect.signature(_function(name)).parameters


def unserved_reason(name: str, query: Tensor, layout: SequenceLayout, queries: str) -> str | None:
    """Why a library cannot serve a call, or None if it can."""
    if name == OWN:
        return None
    reasons = {
        f"it serves cuda tensors, and these are on {query.device.type}": not query.is_cuda,
        f"it serves bf16 and fp16, not {query.dtype}": query.dtype not in (torch.bfloat16, torch.float16),
        f"its heads have at most {LIBRARIES[name].most_features} features": (
            query.shape[-1] > LIBRARIES[name].most_features
        ),
        "it serves packed sequences, and these share prompts": layout.shares_prompts,
        "it serves packed sequences, and these are padded": layout.has_padding,
        "it serves packed sequences, and here only responses have queries": queries != "all",
        "there is no sequence": layout.num_sequences == 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def choose_attention(query: Tensor, layout: SequenceLayout, queries: str) -> Choice:
    """Whose attention serves a call, and why: forced, measured to be the fastest here, or our own.

    Raises:
        ValueError: what is forced is unknown, not installed, or cannot serve the call.
    """
    if _forced is not None:
        return _forced_choice(_forced, "use_attention", query, layout, queries)
    named = os.environ.get(ATTENTION_VARIABLE)
    if named:
        return _forced_choice(named, ATTENTION_VARIABLE, query, layout, queries)
    if not query.is_cuda or torch.compiler.is_compiling():
        return Choice(OWN, "it serves every layout")
    fastest = measured_attention().get(key(query.shape[-1], query.dtype), OWN)
    if fastest == OWN or unavailable_reason(fastest) or unserved_reason(fastest, query, layout, queries):
        return Choice(OWN, "it serves every layout")
    if torch.is_grad_enabled() and not is_deterministic(fastest):
        return Choice(OWN, f"the backward of {fastest} may differ from run to run")
    return Choice(fastest, "measured to be the fastest here")


def _forced_choice(name: str, source: str, query: Tensor, layout: SequenceLayout, queries: str) -> Choice:
    reason = unavailable_reason(name) or unserved_reason(name, query, layout, queries)
    if reason is not None:
        raise ValueError(f"attention {name!r}, forced by {source}: {reason}")
    return Choice(name, f"forced by {source}")


def attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SequenceLayout,
    causal: bool,
    scale: float,
) -> Tensor:
    """``[T, H, e]`` by a library, its backward deterministic where it can be asked for that.

    Raises:
        ValueError: this version of the library's function cannot be told whether attention is causal.
    """
    function = _function(name)
    ranges, longest = layout.ranges, layout.max_length
    bounds = torch.cat([ranges[:, 0], ranges[-1:, 1]])
    arguments = {  # under every name that a library has for them
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seq_q", "cu_seq_k"), bounds),
        **dict.fromkeys(("max_seqlen_q", "max_seqlen_k", "max_q", "max_k"), longest),
        **dict.fromkeys(("softmax_scale", "scale"), scale),
        **dict.fromkeys(("causal", "is_causal"), causal),
        "enable_gqa": query.shape[1] != key.shape[1],
        "deterministic": True,
        "num_splits": 1,  # a sequence's bits must not depend on the longest of its batch
    }
    known = inspect.signature(function).parameters
    if not known.keys() & {"causal", "is_causal"}:
        if "window_size" not in known:
            raise ValueError(f"attention {name!r}: this version of it takes neither causality nor a window")
        arguments["window_size"] = (-1, 0 if causal else -1)
    usual = query.shape[-1] ** -0.5
    if not known.keys() & {"softmax_scale", "scale"} and scale != usual:
        query = query * (scale / usual)
    arguments = {name: x for name, x in arguments.items() if name in known}
    out = function(query, key, value, **arguments)
    return out[0] if isinstance(out, tuple) else out


def key(head_size: int, dtype: torch.dtype) -> str:
    """The name of a measurement."""
    return f"attention e={head_size} {str(dtype).removeprefix('torch.')}"


@functools.cache
def measured_attention() -> dict[str, str]:
    """The fastest attention by `key`, from the file that ``python -m adajudge_kernels.tune`` writes; else empty."""
    return measured_names("attention", (OWN, *LIBRARIES))
