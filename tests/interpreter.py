"""Triton's interpreter without the work whose results nobody reads: the same values, in half the time. And sums of many
numbers by halves, as GPUs form them, wherever the numbers lie."""

from dataclasses import replace
from functools import cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_entered = set()  # modules of device functions, by their globals


def _call_device_function(self, *args, **kwargs):
    """As triton's own, which replaces the members of `triton.language` again at every call: a launch has done so already, and
    what only the function's module sees stays replaced."""
    if id(self.fn.__globals__) not in _entered:
        _entered.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


_numpy_dtype = interpreter._get_np_dtype
_numpy_dtype_of_scalar = cache(_numpy_dtype)  # which makes a table of all for each that is asked for


def _get_np_dtype(dtype):
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _numpy_dtype_of_scalar(scalar)


_sum = interpreter.ReduceOps.sum


def _sum_by_halves(self, tile):
    """numpy adds one after the other along any axis but the last, and is off by more the more there are."""
    data = tile.handle.data
    if data.ndim < 3 or self.axis in (None, data.ndim - 1):
        return _sum(self, tile)
    lined_up = np.ascontiguousarray(np.moveaxis(data, self.axis, -1)).sum(axis=-1)
    return self.to_tensor(np.expand_dims(lined_up, self.axis) if self.keep_dims else lined_up, tile.dtype)


def change():
    """Change the interpreter of this process."""
    # It computes whether an integer sum overflows, in int64, and reads that with `debug` only, which it never sets.
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter._get_np_dtype = _get_np_dtype
    interpreter.ReduceOps.sum = _sum_by_halves
