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
from torch._C import _are_functorch_transforms_active as functorch_transforms_active
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._functorch import is_legacy_batchedtensor as is_batched_gradient
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.library import CustomOpDef, custom_op
from torch.nn import Parameter

from adajudge_kernels import backends


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What pooled views, scores and rewards come in: fp32, or fp64 for fp64 states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fresh(x: Tensor) -> Tensor:
    """Room like `x`, contiguous, as gradients come; ``empty_like`` would keep strange strides."""
    return x.new_empty(x.shape)


def or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient, or zeros where none came: for outputs that nobody used."""
    return torch.zeros_like(like) if grad is None else grad


class Operation:
    """An operation that can be called in two ways, with the same body and the same autograd.

    Under ``torch.compile``, ``torch.export`` and torch's dispatch modes it is the opaque operator
    ``torch.ops.adajudge.<name>``. In plain eager mode it is called directly: the operator's own way there goes through
    the dispatcher and back into Python (docs/triton-pooling.md has what each costs).
    """

    def __init__(self, name: str, run: Callable[..., Any], definition: CustomOpDef) -> None:
        self.name, self._run, self._definition = name, run, definition
        self._opaque = getattr(torch.ops.adajudge, name).default
        self._gradients: Callable[..., Any] | None = None
        self._context: Callable[..., None] | None = None

    def register_autograd(
        self, gradients: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """As ``torch.library.register_autograd``; a list of tensors gets a list of gradients."""
        arguments = len(self._opaque._schema.arguments)

        def gradients_if_any(ctx: Any, *grads: Tensor | None) -> Any:
            if grads and all(grad is None for grad in grads):  # nobody used any output
                return (None,) * arguments
            if not is_dynamo_compiling() and any(
                isinstance(grad, Tensor) and is_batched_gradient(grad) for grad in grads
            ):
                raise RuntimeError(
                    f"adajudge_kernels.{self.name} has no batched backward: no is_grads_batched=True and no "
                    "vectorize=True; ask for one gradient at a time"
                )
            return gradients(ctx, *grads)

        self._definition.register_autograd(gradients_if_any, setup_context=setup_context)
        self._gradients, self._context = gradients_if_any, setup_context

    def __call__(self, *args: Any) -> Any:
        """Run on the arguments of the body, in its order.

        Raises:
            RuntimeError: under a transform of ``torch.func`` or in forward-mode differentiation.
        """
        if is_dynamo_compiling():
            return self._opaque(*args)
        if functorch_transforms_active() or forward_ad._current_level >= 0:
            raise RuntimeError(
                f"adajudge_kernels.{self.name} has a backward only: no torch.func transform (grad, vmap, jvp) and no "
                "forward-mode differentiation; use torch.autograd"
            )
        if dispatch_modes() or is_tracing():  # fake tensors, proxies; torch.jit.trace
            return self._opaque(*args)
        # What gradients are wanted of, and where it lies: argument, place in its list.
        wanted: list[Tensor] = []
        places: list[tuple[int, int | None]] = []
        for i, arg in enumerate(args):
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                # A view that only the dispatcher gives its sign; a shape only.
                if arg.is_neg() or arg.is_meta:
                    return self._opaque(*args)
                if arg.requires_grad:
                    wanted.append(arg)
                    places.append((i, None))
            elif kind is list:
                for k, x in enumerate(arg):
                    if (type(x) is not Tensor and type(x) is not Parameter) or x.is_neg() or x.is_meta:
                        return self._opaque(*args)
                    if x.requires_grad:
                        wanted.append(x)
                        places.append((i, k))
            elif isinstance(arg, Tensor):  # a subclass: its __torch_dispatch__ wants to see the operator
                return self._opaque(*args)
        if not wanted or not torch.is_grad_enabled():
            return self._run(*args)
        if self._context is None:  # a backward: its autograd says that there is no second derivative
            return self._opaque(*args)
        return _apply(self, args, places, *wanted)


class _Direct(torch.autograd.Function):
    """An operation's forward and backward without an operator around them."""

    @staticmethod
    def forward(
        ctx: Any, operation: Operation, args: tuple[Any, ...], places: list[Any], *wanted: Tensor
    ) -> Any:
        output = operation._run(*args)
        ctx.operation, ctx.places = operation, places
        operation._context(ctx, args, output)  # type: ignore[misc]
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gradients = ctx.operation._gradients(ctx, *grads)
        found = [x if k is None or x is None else x[k] for x, k in ((gradients[i], k) for i, k in ctx.places)]
        return None, None, None, *found


# As _Direct.apply, without its questions about torch.func, which `Operation` has asked already.
_apply = super(torch.autograd.Function, _Direct).apply


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operation]:
    """Register the decorated function as ``adajudge::name``; `fake` gives its outputs' shapes and dtypes.

    The body runs with autocast off: operations do their arithmetic in fp32 whatever is around them.
    """

    operation_name = name.removesuffix("_backward")

    def register(body: Callable[..., Any]) -> Operation:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> Any:
            backends.log_once(operation_name, args[-1] if args else kwargs["backend"])
            if not is_any_autocast_enabled():
                return body(*args, **kwargs)
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return body(*args, **kwargs)

        schema = torch.library.infer_schema(body, mutates_args=())
        definition = custom_op(f"adajudge::{name}", run, mutates_args=(), schema=schema)
        definition.register_fake(fake)
        operation = Operation(name, run, definition)
        if name != operation_name:
            operation.register_autograd(functools.partial(_no_double_backward, operation_name))
        return operation

    return register


def _no_double_backward(name: str, *_: Any) -> NoReturn:
    raise RuntimeError(
        f"adajudge_kernels.{name} has no second derivative: call backward without create_graph=True, "
        "or compute this part with your own PyTorch code"
    )
