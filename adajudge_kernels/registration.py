"""How an operation becomes a torch operator: forward, backward, shapes, autograd.

Every operation is a pair of opaque operators ``adajudge::name`` and ``adajudge::name_backward``, so that
``torch.compile`` sees one node each way, whatever backend serves it. The backend's name is an argument,
chosen before the call; the forward's choice serves the backward too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from adajudge_kernels import backends


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What pooled views, scores and rewards come in: fp32, or fp64 for fp64 states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fresh(x: Tensor) -> Tensor:
    """For fakes: a contiguous tensor like `x`, as the gradients come; ``empty_like`` would keep strange strides."""
    return x.new_empty(x.shape)


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register the decorated function as ``adajudge::name``; `fake` gives its outputs' shapes and dtypes.

    The body runs with autocast off: operations do their arithmetic in fp32 whatever is around them.
    """

    def register(body: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> Any:
            backends.log_once(name.removesuffix("_backward"), args[-1] if args else kwargs["backend"])
            if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
                return body(*args, **kwargs)
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return body(*args, **kwargs)

        schema = torch.library.infer_schema(body, mutates_args=())
        definition = custom_op(f"adajudge::{name}", run, mutates_args=(), schema=schema)
        definition.register_fake(fake)
        if name.endswith("_backward"):
            definition.register_autograd(
                functools.partial(_no_double_backward, name.removesuffix("_backward"))
            )
        return definition

    return register


def _no_double_backward(name: str, *_: Any) -> NoReturn:
    raise RuntimeError(
        f"adajudge_kernels.{name} has no second derivative: call backward without create_graph=True, "
        "or compute this part with your own PyTorch code"
    )
