"""What is special to the compiled CPU kernels: bits and errors on every instruction set, any memory, torch's threads."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import adajudge_kernels as ak
from adajudge_kernels import backends, compiled
from adajudge_kernels.refinement.ops import residual_rms_norm, sequence_attention
from tests.kernels.batches import LAYOUTS, LONG, RAGGED, Batch, place
from tests.kernels.cases import dtypes, pooling, rowwise, tokenwise
from tests.kernels.comparison import (
    assert_same_bits,
    cast,
    compare,
    compare_rowwise,
    far_from_zero,
    on_every_level,
    on_several_threads,
    run_operation,
    run_truth,
    usual_errors,
)
from tests.kernels.operations import POOLING, VIEW_NAMES, attend, over_tokens


def test_the_compiled_module_is_here():
    assert compiled.missing is None
    assert backends.choose_backend(torch.device("cpu"), "pooling").backend == "cpu"


@pooling
@pytest.mark.parametrize("shift", ["mean", "outlier"])
def test_long_sums_usually_lose_no_more_digits_than_plain_pytorchs(operation, shift):
    """They are summed by tile, chunk and run: one plain sum over a run loses 1.4 times as many."""
    batch = Batch((0, 300), ((300,), (260, 5)))

    def draw():
        return far_from_zero(operation.draw(batch, 40, 2), shift)

    with ak.use_backend("cpu"):
        errors = usual_errors(operation, draw, batch, torch.device("cpu"), 25)
    for value, (usual, plain) in errors.items():
        assert not value.startswith("output") or usual <= 1.1 * plain, value


@tokenwise
@dtypes
def test_every_instruction_set_keeps_the_error_bound(operation, dtype, levels):
    inputs = operation.draw(RAGGED, 77, 3)
    with ak.use_backend("cpu"):
        for _ in on_every_level(levels, lambda: None):
            compare(operation, inputs, RAGGED, "shared", dtype, torch.device("cpu"))


@rowwise
@dtypes
def test_every_instruction_set_keeps_the_error_bound_row_by_row(name, draw, call, truth, dtype, levels):
    inputs = draw(37)
    with ak.use_backend("cpu"):
        for _ in on_every_level(levels, lambda: None):
            compare_rowwise(name, call, truth, inputs, dtype, torch.device("cpu"))


@pooling
@dtypes
@pytest.mark.parametrize(("kind", "d", "depths"), [("shared", 77, 3), ("padded_left", 300, 5)])
def test_instruction_sets_that_fuse_give_the_same_bits(operation, dtype, kind, d, depths, fusing_levels):
    inputs = operation.draw(RAGGED, d, depths)
    layout, source = RAGGED.lay_out(kind)
    run = lambda: run_operation(operation, cast(inputs, dtype), layout, source)  # noqa: E731
    with ak.use_backend("cpu"):
        assert_same_bits(on_every_level(fusing_levels, run))


@dtypes
@pytest.mark.parametrize(("kind", "size"), [("shared", 33), ("padded_left", 128)])
def test_attention_has_the_same_bits_on_instruction_sets_that_fuse_and_any_threads(
    dtype, kind, size, fusing_levels
):
    operation = attend(heads=10, key_heads=2)
    inputs = cast(operation.draw(LONG, size, 1), dtype)
    layout, source = LONG.lay_out(kind)
    inputs = {name: place(x.detach(), source) for name, x in inputs.items()}
    run = lambda: (operation.call(inputs, layout), {})  # noqa: E731
    with ak.use_backend("cpu"):
        assert_same_bits(itertools.chain(on_every_level(fusing_levels, run), on_several_threads(run)))


def test_attention_leaves_out_keys_of_no_weight_wherever_they_come():
    """Of a whole block of keys, too, the first; and wherever torch makes tensors when nobody says where."""
    query, value = torch.ones(100, 1, 16), torch.randn(100, 1, 16)
    key = torch.cat([torch.full((70, 1, 16), -torch.inf), torch.ones(30, 1, 16)])
    layout = ak.SequenceLayout.packed([0], [100])
    with ak.use_backend("cpu"), torch.device("meta"):
        out = sequence_attention([query, key, value], layout, causal=False)
    assert torch.allclose(out, value[70:].mean(dim=0).expand_as(out), atol=1e-6)


@rowwise
@dtypes
def test_instruction_sets_that_fuse_give_the_same_bits_row_by_row(
    name, draw, call, truth, dtype, fusing_levels
):
    inputs = draw(37)
    with ak.use_backend("cpu"):
        assert_same_bits(on_every_level(fusing_levels, lambda: run_truth(call, cast(inputs, dtype))))


# Runs of chunks: of two threads the last ones are cut, of five more of them, and of one none.
SEVERAL_RUNS = Batch((600, 0), ((800, 700), (3,)))


@pooling
@pytest.mark.parametrize("kind", ["shared", "padded_right"])
@pytest.mark.parametrize(("batch", "d"), [(LONG, 300), (SEVERAL_RUNS, 50)], ids=["chunks", "runs"])
def test_the_number_of_threads_changes_no_bit(operation, batch, d, kind):
    layout, source = batch.lay_out(kind)
    inputs = operation.draw(batch, d, 3)
    run = lambda: run_operation(operation, cast(inputs, torch.float32), layout, source)  # noqa: E731
    assert_same_bits(on_several_threads(run))


def in_other_memory(x, offset):
    """The same numbers, off every boundary that vectors have."""
    held = torch.empty(x.numel() + offset, dtype=x.dtype)
    return held[offset:].view(x.shape).copy_(x)


@pooling
@dtypes
@pytest.mark.parametrize("offset", [1, 3])
def test_where_the_states_lie_changes_no_bit(operation, dtype, offset):
    layout, source = LONG.lay_out("packed")
    drawn = {name: x.to(dtype) for name, x in operation.draw(LONG, 45, 2).items()}
    placed = {name: place(x, source) if over_tokens(name) else x for name, x in drawn.items()}
    moved = {name: in_other_memory(x, offset) for name, x in placed.items()}
    strided = {name: torch.stack([x, x], dim=-1)[..., 0] if x.dim() == 2 else x for name, x in placed.items()}
    expected = operation.call(placed, layout)
    for other in (moved, strided):
        assert all(torch.equal(a, b) for a, b in zip(operation.call(other, layout), expected, strict=True))


@dtypes
def test_where_the_states_lie_changes_no_gradient(dtype):
    layout, source = LONG.lay_out("packed")
    drawn = {name: x.to(dtype) for name, x in POOLING[1].draw(LONG, 45, 2).items()}
    placed = {name: place(x, source) if over_tokens(name) else x for name, x in drawn.items()}
    runs = []
    for move in (
        torch.clone,
        lambda x: in_other_memory(x, 1),
        lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    ):
        leaves = {name: move(x).detach().requires_grad_() for name, x in placed.items()}
        runs.append(run_truth(lambda x: POOLING[1].call(x, layout), leaves))
    assert_same_bits(runs)


@dtypes
@pytest.mark.parametrize("d", [1024, 1040], ids=["whole cache lines", "parts of cache lines"])
def test_gradients_past_the_caches_are_those_of_each_sequence_alone(d, dtype, levels):
    """Large ones are stored another way where their rows allow it; those of a sequence alone are small."""
    lengths, depths = [900, 1, 1250, 700], 6
    layout = ak.SequenceLayout.packed([0] * 4, lengths)
    states = [torch.randn(sum(lengths), d).to(dtype) for _ in range(depths)]
    assert depths * states[0].nbytes >= 32 << 20
    alpha, weight = torch.softmax(torch.randn(4, depths), dim=1), torch.randn(d) / d**0.5

    def gradients(xs, alpha, layout):
        leaves = [x.clone().requires_grad_() for x in xs]
        views = ak.multi_view_pool(leaves, alpha, weight, torch.zeros(1), layout)
        return torch.autograd.grad(sum(view.cos().sum() for view in views), leaves)

    for _ in on_every_level(levels, lambda: None):
        whole = gradients(states, alpha, layout)
        for b, (stop, length) in enumerate(zip(itertools.accumulate(lengths), lengths, strict=True)):
            rows = slice(stop - length, stop)
            own = [x[rows] for x in states]
            alone = gradients(own, alpha[b : b + 1], ak.SequenceLayout.packed([0], [length]))
            assert all(torch.equal(x[rows], y) for x, y in zip(whole, alone, strict=True))


@pytest.mark.parametrize("d", [700, 5000])
def test_a_token_read_alone_gets_the_views_gradient_as_it_is(d):
    """Its weight is exactly 1, however large its logit: the backward sums it as the forward does."""
    hidden, weight, grad = torch.randn(16, d) + 1, 100 * torch.rand(d), torch.randn(8, d)
    layout = ak.SequenceLayout.packed([1] * 8, [1] * 8)
    hidden.requires_grad_()
    with ak.use_backend("cpu"):
        pooled = ak.attention_pool(hidden, weight, torch.zeros(1), layout, tokens="response")
        pooled.backward(grad)
    assert torch.equal(hidden.grad[1::2], grad)


HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def bits_of(call, inputs, small, dtype):
    """With the inputs that `small` names in `dtype`, and with the same numbers in fp32."""
    for widened in (False, True):
        rounded = {name: x.to(dtype) if small(name) else x.float() for name, x in inputs.items()}
        leaves = {name: x.float() if widened else x for name, x in rounded.items()}
        outputs, gradients = run_truth(call, {name: x.requires_grad_() for name, x in leaves.items()})
        yield outputs, {name: grad for name, grad in gradients.items() if not small(name)}


@pooling
@HALVES
def test_small_arguments_of_16_bits_have_the_bits_of_the_same_numbers_in_fp32(operation, dtype):
    layout, source = RAGGED.lay_out("shared")
    inputs = operation.draw(RAGGED, 77, 3)
    placed = {name: place(x, source) if over_tokens(name) else x for name, x in inputs.items()}
    assert_same_bits(
        bits_of(lambda x: operation.call(x, layout), placed, lambda name: not over_tokens(name), dtype)
    )


@rowwise
@HALVES
def test_small_arguments_of_16_bits_have_the_bits_of_the_same_numbers_in_fp32_row_by_row(
    name, draw, call, truth, dtype
):
    rows = {"x", "update", "gate_up", *VIEW_NAMES}
    assert_same_bits(bits_of(call, draw(37), lambda argument: argument not in rows, dtype))


@HALVES
def test_every_number_of_16_bits_is_widened_as_it_is(dtype, levels):
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    ones = torch.ones(1, 1 << 14)
    for weight in numbers.split(ones.numel()):
        for _ in on_every_level(levels, lambda: None):
            normed = residual_rms_norm(ones, None, weight, eps=1e-30)[1][0]
            number = ~weight.isnan()
            assert torch.equal(normed[number].view(torch.int32), weight.float()[number].view(torch.int32))
            assert normed[~number].isnan().all()


def test_a_view_with_the_negative_bit_is_read_with_its_sign():
    layout = ak.SequenceLayout.packed([0], [3])
    x = torch.randn(3, 4)
    assert torch.equal(ak.masked_mean_pool(torch._neg_view(x), layout), -ak.masked_mean_pool(x, layout))


def test_subnormal_numbers_are_treated_as_the_caller_says():
    run_code("""
torch.set_num_threads(4)
tiny = [torch.full((4000, 256), 1e-39) for _ in range(2)]
means = lambda: ak.multi_view_pool(tiny, *arguments[1:]).mean
assert means().all()
assert torch.set_flush_denormal(True)
for _ in range(5):
    assert not means().any(), "some threads keep subnormal numbers"
""")


@pooling
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_state_breaks_its_own_sequences_and_no_other(operation, kind, value):
    batch = Batch((3, 4), ((5, 70), (6,)))  # token 3 is the first of the first response
    layout, source = batch.lay_out(kind)
    drawn = {name: x.float() for name, x in operation.draw(batch, 20, 2).items()}
    broken = {name: x.clone() for name, x in drawn.items()}
    for name, x in broken.items():
        if over_tokens(name):
            x[3, 7] = value
    clean, bad = (
        operation.call({n: place(x, source) if over_tokens(n) else x for n, x in inputs.items()}, layout)
        for inputs in (drawn, broken)
    )
    for a, b in zip(clean, bad, strict=True):
        assert torch.equal(a[1:], b[1:])
    if operation.name not in ("masked_mean_pool[prompt]",):
        assert any(not b[0].isfinite().all() for b in bad)


def test_an_unknown_instruction_set_is_refused():
    command = [sys.executable, "-c", "import adajudge_kernels"]
    environment = os.environ | {"ADAJUDGE_SIMD": "mmx"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode != 0
    assert "ADAJUDGE_SIMD=mmx: this processor has none of that name, only" in result.stderr
    with pytest.raises(ValueError, match="this processor has no mmx"):
        compiled.module.use_level("mmx")


def test_the_instruction_set_can_be_chosen():
    code = "from adajudge_kernels import compiled; print(compiled.module.level())"
    for level in compiled.module.levels():
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | {"ADAJUDGE_SIMD": level},
            check=True,
        )
        assert result.stdout.strip() == level


def test_tensors_elsewhere_are_refused():
    with (
        pytest.raises(ValueError, match="it serves cpu tensors, and these are on cuda"),
        ak.use_backend("cpu"),
    ):
        backends.choose_backend(torch.device("cuda"), "pooling")


# Threads

LARGE = """
import os, torch
import adajudge_kernels as ak
layout = ak.SequenceLayout.packed([500] * 4, [500] * 4)
states = [torch.ones(4000, 256) for _ in range(2)]
arguments = states, torch.full((4, 2), 0.5), torch.ones(256), torch.zeros(1), layout
threads = lambda: len(os.listdir("/proc/self/task"))
"""


def run_code(code):
    result = subprocess.run(
        [sys.executable, "-c", LARGE + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr


def test_threads_are_those_that_torch_is_told_to_use():
    run_code("""
torch.set_num_threads(1)
before = threads()
ak.multi_view_pool(*arguments)
assert threads() == before, "one thread is the caller"
torch.set_num_threads(6)
ak.multi_view_pool(*arguments)
used = threads()
assert used > before, "six threads are not one"
torch.ones(1 << 24).sum()
assert threads() == used, "torch's own work is done by the same threads"
""")


def test_a_forked_data_loader_worker_uses_one_thread():
    run_code("""
class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2  # one a worker: to send it, the worker starts threads of its own
    def __getitem__(self, i):
        before = threads()
        views = ak.multi_view_pool(*arguments)
        return views.attention, threads() - before
torch.set_num_threads(2)
expected = ak.multi_view_pool(*arguments).attention  # the parent's pool of threads is there when it forks
assert threads() > 1
loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork")
for attention, more in loader:
    assert torch.equal(attention, expected)
    assert more == 0
""")


def test_calls_from_many_threads_do_not_disturb_each_other():
    layout = ak.SequenceLayout.packed([300] * 3, [200] * 3)
    states = [torch.randn(1500, 128) for _ in range(3)]
    arguments = states, torch.full((3, 3), 1 / 3), torch.randn(128), torch.zeros(1), layout
    expected = ak.multi_view_pool(*arguments)
    with ThreadPoolExecutor(4) as pool:
        for views in pool.map(lambda _: ak.multi_view_pool(*arguments), range(40)):
            assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


def test_the_loss_is_accurate_to_the_last_digits_at_every_margin(levels):
    """-log p of a pair is the gradient of its weight; log pi is that of an entropy's floor, but for a shortfall of one."""
    sizes = torch.logspace(-20, 1.9, 3001)
    margins = torch.cat([-sizes.flip(0), torch.zeros(1), sizes])
    weights = torch.logspace(-37, 0, 3000)[:, None].expand(-1, 3)

    def digits(dtype):
        z, pi = margins.to(dtype), weights.to(dtype)
        w, pi = torch.ones_like(z).requires_grad_(), pi.clone().requires_grad_()
        floor = {"view_weights": pi, "entropy_floor": 1.0986122886681098, "entropy_weight": 1.0}
        loss = ak.focal_bradley_terry_loss(z, torch.zeros_like(z), gamma=0.0, pair_weight=w, **floor)
        loss.backward()
        return w.grad * len(z), pi.grad * len(pi)

    minus_log_p, of_pi = digits(torch.float64)
    for minus_log_p_here, of_pi_here in on_every_level(levels, lambda: digits(torch.float32)):
        assert torch.allclose(minus_log_p_here.double(), minus_log_p, rtol=4 * 2.0**-23, atol=2.0**-126)
        assert torch.allclose(of_pi_here.double(), of_pi, rtol=16 * 2.0**-23, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_reward_breaks_its_own_pair_and_the_loss(value):
    chosen = torch.zeros(40)
    chosen[17] = value
    chosen.requires_grad_()
    weight = torch.ones(40, requires_grad=True)
    loss = ak.focal_bradley_terry_loss(chosen, torch.zeros(40), pair_weight=weight)
    loss.backward()
    assert bool(loss.isfinite()) == (value == float("inf"))  # that pair is right for certain
    others = torch.arange(40) != 17
    assert chosen.grad[others].isfinite().all()
    assert weight.grad[others].isfinite().all()
