"""The quick look at an operation's arguments says yes exactly where the checks that name what is wrong find nothing."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

import adajudge_kernels as ak
from adajudge_kernels import arguments, compiled
from adajudge_kernels.pooling import ops
from adajudge_kernels.tables import LayoutTables

pytestmark = pytest.mark.skipif(compiled.module is None, reason="the quick look is the compiled module's")

LAYOUT = ak.SequenceLayout.packed([2, 1], [3, 2])  # 8 tokens, 2 sequences


class Named(torch.Tensor):
    """A tensor of another type."""


def drawn(*shape):
    return torch.rand(*shape)


CALLS = {
    "depth_gate": (ak.depth_gate, {"hidden": drawn(8, 6), "weight": drawn(3, 6), "bias": drawn(3)}),
    "multi_view_pool": (
        ak.multi_view_pool,
        {
            "states": [drawn(8, 6), drawn(8, 6)],
            "depth_weights": drawn(2, 2),
            "attention_weight": drawn(6),
            "attention_bias": drawn(1),
        },
    ),
    "masked_mean_pool": (ak.masked_mean_pool, {"hidden": drawn(8, 6)}),
    "attention_pool": (
        ak.attention_pool,
        {"hidden": drawn(8, 6), "weight": drawn(6), "bias": drawn(1)},
    ),
}
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)


def others(x):
    """What might come in the place of an argument."""
    if isinstance(x, list):
        yield from (
            [],
            tuple(x),
            x * 5,
            x[:1],
            x[0],
            torch.stack(x),
            [x[0], None],
            [x[0], x[1].half()],
            iter(x),
        )
        for other in others(x[1]):
            yield [x[0], other]
        for dtype in DTYPES:
            yield [each.to(dtype) for each in x]
        return
    yield from (
        None,
        1.0,
        x.numpy(),
        [x],
        list(x),
        tuple(x),
        x.to("meta"),
        Parameter(x),
        x.as_subclass(Named),
    )
    yield from (x.to(dtype) for dtype in DTYPES)
    if hasattr(torch, "float8_e4m3fn"):
        yield x.to(torch.float8_e4m3fn)
    yield from (x[None], x[..., None], x[0], x[:-1], x[..., :-1], x[:0], x[..., :0], torch.cat([x, x]))
    yield x.new_ones(*x.shape[:-1], arguments.MAX_FEATURES + 1)
    yield x.mT.contiguous().mT if x.dim() == 2 else torch.stack([x, x], dim=1)[:, 0]


def layouts():
    yield from (
        LAYOUT,
        None,
        "packed",
        LAYOUT.tables,
        dataclasses.replace(LAYOUT, tables=None),
        LAYOUT.to("meta"),
    )
    yield ak.SequenceLayout.packed([2, 1], [3, 3])
    yield ak.SequenceLayout.padded(torch.ones(2, 4), torch.ones(2, 4))


def outcome(call, given, layout):
    try:
        result = call(*given.values(), layout)
    except ValueError as error:
        return str(error)
    return [x.tolist() for x in ([result] if isinstance(result, torch.Tensor) else result)]


@pytest.mark.parametrize("name", CALLS)
def test_the_quick_look_says_yes_where_the_checks_find_nothing(name, monkeypatch):
    call, usual = CALLS[name]
    cases = [(usual | {argument: other}, LAYOUT) for argument, x in usual.items() for other in others(x)]
    cases += [(usual, layout) for layout in layouts()]
    answers = []

    def remembered(*args):
        answers.append(arguments.fit(*args))
        return answers[-1]

    fitting = 0
    for given, layout in cases:
        with monkeypatch.context() as patch:
            patch.setattr(ops, "fit", remembered)
            quick = outcome(call, given, layout)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "fit", lambda *_: False)
            checked = outcome(call, given, layout)
        assert quick == checked
        flat = [x for each in given.values() for x in (each if isinstance(each, (list, tuple)) else [each])]
        plain = all(type(x) in (torch.Tensor, Parameter) for x in flat)
        assert not answers[-1] or (plain and isinstance(checked, list)), f"{given}: {checked}"
        assert answers[-1] or not (plain and isinstance(checked, list)), f"{given} has the right form"
        fitting += answers[-1]
    assert 5 < fitting < len(cases) / 2


def test_the_module_refuses_what_it_cannot_read_or_write():
    module, layout, x = compiled.module, LAYOUT.tables.native, torch.ones(8, 6)
    out, where = torch.empty(2, 6), module.Stream(0, lambda size: 0) if module.emulated else 1
    with pytest.raises(TypeError, match="a tensor of floating point numbers was expected"):
        module.means(where, layout, x.int(), None, None, out)
    with pytest.raises(ValueError, match="a contiguous tensor was expected"):
        module.means(where, layout, x, None, None, torch.empty(6, 2).T)
    with pytest.raises(TypeError, match="a table of other integers was expected"):
        module.means(where, module.Layout([x.int() for _ in range(5)]), x, None, None, out)
    with pytest.raises((TypeError, RuntimeError)):
        module.means(where, layout, "states", None, None, out)
    freed = torch.ones(8, 6)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a tensor without its numbers came"):
        module.means(where, layout, freed, None, None, out)


def test_a_torch_that_shows_no_tensors_leaves_plain_pytorch_and_a_reason():
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import adajudge_kernels as ak
from adajudge_kernels import backends
layout = ak.SequenceLayout.packed([2], [3])
ak.masked_mean_pool(torch.ones(5, 4), layout)
print(ak.available_backends(), backends.unavailable_reason("cpu"))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "it cannot read the tensors of torch" in result.stdout
    assert "'reference'" in result.stdout
    assert "'cpu'" not in result.stdout


def test_fake_tables_are_not_read(recwarn, capfd):
    with FakeTensorMode() as mode:
        tables = LayoutTables(*(mode.from_tensor(x) for x in LAYOUT.tables))
        layout = dataclasses.replace(LAYOUT, tables=tables)
        assert not arguments.fit(layout, "Td", mode.from_tensor(drawn(8, 6)))
        assert not arguments.fit(LAYOUT, "Td", mode.from_tensor(drawn(8, 6)))
    assert not recwarn.list
    assert "FakeTensor" not in capfd.readouterr().err
