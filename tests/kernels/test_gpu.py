"""What only a GPU can show: huge tensors, graphs, streams, memory. Run by `make test-gpu` for every backend there."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import adajudge_kernels as ak
from adajudge_kernels.refinement.ops import residual_rms_norm, sequence_attention, swiglu
from tests.kernels.batches import LONG, RAGGED
from tests.kernels.comparison import cast, run_operation, run_truth, weighted_sum
from tests.kernels.operations import ATTENTION, POOLING, ROWWISE, normal
from tests.kernels.test_layers import random_head

pytestmark = pytest.mark.gpu
pooling = pytest.mark.parametrize("operation", POOLING, ids=lambda op: op.name)
tokenwise = pytest.mark.parametrize("operation", POOLING + ATTENTION, ids=lambda op: op.name)
rowwise = pytest.mark.parametrize(("name", "draw", "call", "truth"), ROWWISE, ids=[op[0] for op in ROWWISE])


@dataclass(frozen=True)
class Case:
    """An operation of any family: `draw()` gives fp64 inputs by name, `on(device)` what is called with them."""

    name: str
    draw: Callable[[], dict[str, torch.Tensor]]
    on: Callable[[torch.device], Callable[..., tuple[Any, ...]]]


def over_tokens_of_a_long_batch(operation):
    return Case(
        operation.name,
        partial(operation.draw, LONG, 64, 3),
        lambda device: partial(operation.call, layout=LONG.lay_out("shared", device)[0]),
    )


def attention_over_a_long_batch(kind, queries="all", merged=False):
    """Grouped heads; what comes out is not gathered by sequence, which asks the host for the layout."""

    def on(device):
        layout, _ = LONG.lay_out(kind, device)

        def call(x):
            rest = [x["key_value"]] if merged else x["key_value"].unbind(1)
            projections = [x["query"], *rest]
            return (sequence_attention(projections, layout, queries=queries),)

        return call

    def draw():
        layout, _ = LONG.lay_out(kind)
        rows = layout.num_tokens if queries == "all" else len(layout.response_attention.rows)
        return {"query": normal(rows, 4, 64), "key_value": normal(layout.num_tokens, 2, 2, 64)}

    return Case(f"sequence_attention[{kind}, {queries}, {'merged' if merged else 'apart'}]", draw, on)


CASES = [over_tokens_of_a_long_batch(operation) for operation in POOLING]
CASES += [
    attention_over_a_long_batch("shared"),
    attention_over_a_long_batch("shared", "response", merged=True),
    attention_over_a_long_batch("padded_left"),
]
CASES += [Case(name, partial(draw, 20), lambda device, call=call: call) for name, draw, call, _ in ROWWISE]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def backend_of(family, device):
    return ak.backends.choose_backend(device, family).backend


@pytest.fixture(autouse=True)
def only_on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("the test is of a GPU")


def captured(step):
    """A graph of one call of `step`, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@cases
def test_a_captured_graph_gives_the_bits_of_a_plain_call(case, device):
    if case.name.startswith("sequence") and backend_of("refinement", device) == "reference":
        pytest.skip("the reference asks the host for the layout")
    call = case.on(device)
    inputs = cast(case.draw(), torch.bfloat16, device)

    def step():
        outputs = call(inputs)
        leaves = [x for x in inputs.values() if x.requires_grad]
        return *outputs, *torch.autograd.grad(weighted_sum(outputs), leaves, allow_unused=True)

    graph, outputs = captured(step)
    for seed in (1, 2):
        torch.manual_seed(seed)
        for name, x in case.draw().items():
            inputs[name].data.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        expected = step()
        for a, b in zip(outputs, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@cases
def test_work_is_queued_on_the_callers_stream(case, device):
    """The inputs are written late, on a side stream; a kernel on any other stream would read them before that."""
    call = case.on(device)
    inputs = {name: x.to(device, torch.float32) for name, x in case.draw().items()}
    expected = call(inputs)
    late = {name: torch.zeros_like(x) for name, x in inputs.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for name, x in inputs.items():
            late[name].copy_(x)
        outputs = call(late)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def assert_the_same_in_any_memory(draw, run, device):
    """Three runs, before each of which the memory that the allocator will hand out is filled with another number."""
    results = []
    for fill in (0.0, float("nan"), 1e30):
        torch.manual_seed(0)
        inputs = cast(draw(), torch.float32, device)
        torch.cuda.empty_cache()
        blocks = [torch.full((2**k,), fill, device=device) for k in range(6, 25, 2)]
        torch.cuda.synchronize()
        del blocks
        results.append(run(inputs))
    for outputs, gradients in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, results[0][0], strict=True))
        for name, gradient in gradients.items():
            expected = results[0][1][name]
            assert (gradient is None and expected is None) or torch.equal(gradient, expected), name


@tokenwise
def test_no_output_depends_on_what_was_in_fresh_memory(operation, device):
    layout, source = RAGGED.lay_out("padded_left", device)
    run = partial(run_operation, operation, layout=layout, source=source)
    assert_the_same_in_any_memory(partial(operation.draw, RAGGED, 100, 3), run, device)


@rowwise
def test_no_rowwise_output_depends_on_what_was_in_fresh_memory(name, draw, call, truth, device):
    assert_the_same_in_any_memory(partial(draw, 20), partial(run_truth, call), device)


def test_more_than_two_to_the_31_elements(device):
    """Offsets of elements are 64 bits wide: the last sequence of a long batch is read where it lies."""
    d, length = 4096, 1024
    count = 2**31 // (d * length) + 2
    if torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    if backend_of("pooling", device) == "reference":
        pytest.skip("the reference gathers the states, which takes several times their memory")
    layout = ak.SequenceLayout.packed([length // 2] * count, [length // 2] * count, device)
    state = torch.randn(layout.num_tokens, d, device=device, dtype=torch.bfloat16).requires_grad_()
    assert state.numel() > 2**31
    weight, bias = torch.randn(d, device=device) / d**0.5, torch.zeros(1, device=device)
    alpha = torch.ones(count, 1, device=device)
    views = ak.multi_view_pool([state], alpha, weight, bias, layout)
    sum(view.square().sum() for view in views).backward()
    alone = ak.SequenceLayout.packed([length // 2], [length // 2], device)
    last = state.detach()[-length:].clone().requires_grad_()
    expected = ak.multi_view_pool([last], alpha[:1], weight, bias, alone)
    sum(view.square().sum() for view in expected).backward()
    assert all(torch.equal(a[-1], b[0]) for a, b in zip(views, expected, strict=True))
    assert torch.equal(state.grad[-length:], last.grad)


@pooling
def test_memory_held_for_the_backward_is_small_beside_the_states(operation, device):
    if backend_of("pooling", device) == "reference":
        pytest.skip("the reference makes no claim to memory")
    layout = ak.SequenceLayout.packed([1024] * 8, [1024] * 8, device)
    d = 1024
    inputs = {
        "hidden": torch.randn(layout.num_tokens, d, device=device, dtype=torch.bfloat16),
        "alpha": torch.full((8, 2), 0.5, device=device),
        "weight": torch.randn((2, d) if operation.name == "depth_gate" else (d,), device=device),
        "bias": torch.zeros(2 if operation.name == "depth_gate" else 1, device=device),
    }
    if operation.name.startswith("multi_view"):
        inputs |= {"states0": inputs["hidden"], "states1": torch.randn_like(inputs["hidden"])}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    operation.call(inputs, layout)  # compiled, tables loaded
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = operation.call(inputs, layout)
    torch.cuda.synchronize()
    state = layout.num_tokens * d * 2
    assert torch.cuda.memory_allocated() - before <= 0.02 * state
    assert torch.cuda.max_memory_allocated() - before <= 0.15 * state  # two fp32 vectors a chunk of 64 tokens
    del outputs


@contextmanager
def memory(device):
    """What is newly held at the end of the block, and at most held in it, in bytes."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what is reused of a larger block counts as the whole of it
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    found = {}
    yield found
    torch.cuda.synchronize(device)
    found["held"] = torch.cuda.memory_allocated(device) - before
    found["peak"] = torch.cuda.max_memory_allocated(device) - before


REFINEMENT = {  # inputs, call, bytes of what is kept beyond the inputs, of the gradients; of bf16 states [T, d]
    "sequence_attention": (
        lambda t, d: [(t, d // 128, 128), (t, 2, d // 512, 128)],
        lambda layout, query, key_value: [sequence_attention([query, key_value], layout)],
        lambda t, d: 2 * t * d + 4 * t * d // 128,  # the result and the log-sum-exp
        lambda t, d: 3 * t * d + 4 * t * d // 128,  # and the deltas
    ),
    "residual_rms_norm": (
        lambda t, d: [(t, d), (t, d), (d,)],
        lambda layout, x, update, weight: residual_rms_norm(x, update, weight),
        lambda t, d: 4 * t * d,  # the sum and its norm, which are the results
        lambda t, d: 2 * t * d + 2 * 4 * t * d // 64,  # of the weight first two rows a chunk
    ),
    "swiglu": (
        lambda t, d: [(t, 2 * d)],
        lambda layout, gate_up: [swiglu(gate_up)],
        lambda t, d: 2 * t * d,
        lambda t, d: 4 * t * d,
    ),
}


@pytest.mark.parametrize("name", REFINEMENT)
def test_memory_held_by_a_refinement_block_is_what_it_must_be(name, device):
    """Its results and one number a row and head; nothing of the size of the scores, and no other copy of a state."""
    if backend_of("refinement", device) == "reference":
        pytest.skip("the reference makes no claim to memory")
    shapes, call, kept, gradients = REFINEMENT[name]
    layout = ak.SequenceLayout.shared_prompts([2048] * 4, [[512] * 4] * 4, device)
    t, d = layout.num_tokens, 1024
    xs = [torch.randn(s, device=device, dtype=torch.bfloat16).requires_grad_() for s in shapes(t, d)]
    grads = [torch.randn_like(out) for out in call(layout, *xs)]
    torch.autograd.grad(call(layout, *xs), xs, grads)  # compiled
    with memory(device) as forward:
        outputs = call(layout, *xs)
    assert forward["peak"] <= 1.02 * kept(t, d)
    with memory(device) as backward:
        results = torch.autograd.grad(outputs, xs, grads)
    assert backward["peak"] <= 1.02 * gradients(t, d)
    del outputs, results


def test_attention_over_more_than_two_to_the_31_elements(device):
    """Keys and values lie in a merged projection; the last sequence's are behind element 2^31."""
    heads, size, length = 32, 128, 1024
    count = 2**31 // (3 * heads * size * length) + 2
    if torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    if backend_of("refinement", device) == "reference":
        pytest.skip("the reference computes no offsets of its own")
    layout = ak.SequenceLayout.packed([length // 2] * count, [length // 2] * count, device)
    qkv = torch.randn(layout.num_tokens, 3, heads, size, device=device, dtype=torch.bfloat16)
    assert qkv[:-length].numel() > 2**31
    alone = ak.SequenceLayout.packed([length // 2], [length // 2], device)
    last = qkv[-length:].clone().requires_grad_()
    out, expected = (sequence_attention([x], y) for x, y in ((qkv.requires_grad_(), layout), (last, alone)))
    assert torch.equal(out[-length:], expected)
    grad = torch.randn_like(expected)
    # Of the first sequence nothing is read back; of the last its gradient must be where it lies.
    whole = torch.zeros_like(out)
    whole[-length:] = grad
    (got,) = torch.autograd.grad(out, qkv, whole)
    (wanted,) = torch.autograd.grad(expected, last, grad)
    assert torch.equal(got[-length:], wanted)
    assert not got[:length].any()


@pytest.mark.parametrize("attention_tokens", ["all", "response"])
def test_a_captured_graph_scores_as_the_head_does(attention_tokens, device):
    """A whole scoring step of bf16 candidates that share their prompts."""
    if backend_of("refinement", device) == "reference":
        pytest.skip("the reference asks the host for the layout")
    layout, _ = LONG.lay_out("shared", device)
    head = random_head(256, torch.bfloat16, num_blocks=2, attention_tokens=attention_tokens).to(device)
    hidden = torch.zeros(layout.num_tokens, 256, device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        graph, scored = captured(lambda: head(hidden, layout))
        for seed in (1, 2):
            torch.manual_seed(seed)
            hidden.copy_(torch.randn(hidden.shape))
            graph.replay()
            torch.cuda.synchronize()
            expected = head(hidden, layout)
            assert expected.reward.isfinite().all()
            assert all(torch.equal(a, b) for a, b in zip(scored, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@cases
def test_a_second_device(case, device):
    results = []
    for index in (0, 1):
        torch.manual_seed(0)
        there = torch.device("cuda", index)
        outputs, _ = run_truth(case.on(there), cast(case.draw(), torch.float32, there))
        results.append([out.cpu() for out in outputs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
