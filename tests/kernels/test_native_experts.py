"""What the compiled experts and loss promise beyond the contract: the same bits on instruction sets that fuse, for any
number of threads and in any batch; gradients in fp64; large weights each in a dtype of its own."""

import pytest
import torch

import adajudge_kernels as ak
from tests.kernels.comparison import assert_same_bits, cast, on_every_level, on_several_threads, run_truth
from tests.kernels.operations import (
    VIEW_NAMES,
    call_experts,
    call_loss,
    draw_experts,
    draw_loss,
    true_experts,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# d, h, h_r: less than a lane; tiles of units and features with a rest; more than a segment of features.
SIZES = [(1, 1, 1), (24, 16, 20), (70, 37, 5), (1030, 33, 18), (2500, 7, 3)]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(autouse=True)
def cpu_backend():
    with ak.use_backend("cpu", families=("experts", "loss")):
        yield


def run_mixed(inputs, dtype):
    """Outputs and gradients with fp32 views and weights of `dtype`."""
    leaves = {}
    for name, x in inputs.items():
        leaves |= cast({name: x}, torch.float32 if name in VIEW_NAMES else dtype)
    return run_truth(call_experts, leaves)


@dtypes
@sizes
@pytest.mark.parametrize("rows", [3, 150])
def test_experts_have_the_same_bits_on_sets_that_fuse(size, rows, dtype, fusing_levels):
    inputs = draw_experts(rows, *size)
    assert_same_bits(on_every_level(fusing_levels, lambda: run_mixed(inputs, dtype)))


def test_the_loss_has_the_same_bits_on_every_instruction_set(levels):
    inputs = draw_loss(3000)
    assert_same_bits(on_every_level(levels, lambda: run_truth(call_loss, cast(inputs, torch.float32))))


@dtypes
@pytest.mark.parametrize(("rows", "size"), [(1, (700, 300, 100)), (9, (1030, 70, 90)), (300, (300, 40, 33))])
def test_experts_have_the_same_bits_for_any_number_of_threads(rows, size, dtype):
    inputs = draw_experts(rows, *size)
    assert_same_bits(on_several_threads(lambda: run_mixed(inputs, dtype)))


def test_the_loss_has_the_same_bits_for_any_number_of_threads():
    inputs = draw_loss(200_000)
    assert_same_bits(on_several_threads(lambda: run_truth(call_loss, cast(inputs, torch.float32))))


@dtypes
@sizes
def test_a_reward_has_the_same_bits_alone_and_in_any_batch(size, dtype):
    drawn = draw_experts(140, *size)
    inputs = {name: x.to(torch.float32 if name in VIEW_NAMES else dtype) for name, x in drawn.items()}
    whole = call_experts(inputs)
    for begin, stop in ((0, 1), (129, 130), (5, 8), (1, 40), (12, 140)):
        part = {name: x[begin:stop] if name in VIEW_NAMES else x for name, x in inputs.items()}
        assert all(torch.equal(a[begin:stop], b) for a, b in zip(whole, call_experts(part), strict=True))


@pytest.mark.parametrize("size", [(5, 3, 2), (18, 5, 4)], ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_gradcheck_of_experts(rows, size):
    drawn = cast(draw_experts(rows, *size), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *values: call_experts(dict(zip(drawn, values, strict=True))), tuple(drawn.values())
    )


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
@pytest.mark.parametrize("rows", [2, 200])
def test_fp64_gradients_are_those_of_autograd(rows, size):
    inputs = draw_experts(rows, *size)
    outputs, gradients = run_truth(call_experts, cast(inputs, torch.float64))
    exact, true_gradients = run_truth(true_experts, cast(inputs, torch.float64))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(outputs, exact, strict=True))
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, true_gradients[name], rtol=1e-10, atol=1e-11), name


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_gradcheck_of_the_loss(gamma):
    drawn = cast(draw_loss(4), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *values: call_loss(dict(zip(drawn, values, strict=True)), gamma=gamma), tuple(drawn.values())
    )


@pytest.mark.parametrize("view_dtype", DTYPES)
@pytest.mark.parametrize("router_dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 40])
def test_large_weights_of_different_dtypes(view_dtype, router_dtype, rows):
    """Bits are those of the same numbers in fp32; gradients too, each rounded once to its weight's dtype."""
    own = {"view_in_weight": view_dtype, "router_in_weight": router_dtype}
    inputs = {name: x.to(own.get(name, torch.float32)) for name, x in draw_experts(rows, 40, 9, 6).items()}
    mixed = run_truth(call_experts, {name: x.clone().requires_grad_() for name, x in inputs.items()})
    plain = run_truth(call_experts, cast(inputs, torch.float32))
    rounded = {name: x.to(own.get(name, torch.float32)) for name, x in plain[1].items()}
    assert_same_bits([mixed, (plain[0], rounded)])


@pytest.mark.parametrize("name", ["chosen", "rejected", "pair_weight", "view_weights"])
def test_nan_stays_nan_in_the_loss(name):
    inputs = cast(draw_loss(5), torch.float32)
    with torch.no_grad():
        inputs[name][0] = float("nan")
    assert call_loss(inputs)[0].isnan()


def test_no_pairs_and_no_sequences_are_a_loss_of_zero():
    inputs = cast(draw_loss(0), torch.float32)
    outputs, gradients = run_truth(call_loss, inputs)
    assert float(outputs[0]) == 0
    assert all(x is not None and x.numel() == 0 for x in gradients.values())


def test_no_rows_give_weights_a_gradient_of_zero():
    outputs, gradients = run_truth(call_experts, cast(draw_experts(0), torch.float32))
    assert all(out.shape[0] == 0 for out in outputs)
    assert not any(bool(x.any()) for x in gradients.values())
