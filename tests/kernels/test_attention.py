"""What is special to attention inside sequences, beyond the contract: grouped heads, chosen queries, who sees whom."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adajudge_kernels as ak
from adajudge_kernels import SequenceLayout
from adajudge_kernels.refinement.ops import sequence_attention
from tests.kernels import naive
from tests.kernels.batches import LAYOUTS, Batch, lengths_with_unread_prompts, place
from tests.kernels.cases import DTYPES, dtypes, generated, layouts, stored_layouts
from tests.kernels.comparison import compare
from tests.kernels.conftest import INTERPRETED
from tests.kernels.operations import attend, sequence_slots

PACKED = tuple(kind for kind in LAYOUTS if kind != "shared")
# Tiles with a mask and without, prompts that end inside of one and on its edge, and a prompt that nobody reads.
BATCH = Batch((70, 0, 5, 64), ((65, 1), (3,), (), (63, 2)))
# Every entry of the tables of steps, widths that are no power of two, and one feature.
HEAD_SIZES = (1, 16, 64, 80, 128, 256)
grouped = attend(heads=4, key_heads=2)


@pytest.fixture
def exact(device, monkeypatch):
    """Whether a row's bits depend on nothing but what it sees: not on the reference. Triton's interpreter calls BLAS, which
    gives a row of a product other bits in another place of the matrix: here it sums every row alike."""
    backend = ak.backends.choose_backend(device, "refinement").backend
    if backend == "triton" and INTERPRETED:
        from triton.runtime import interpreter

        def create_dot(self, a, b, d, *_):
            product = np.einsum("mk,kn->mn", a.data, b.data, dtype=d.data.dtype)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return backend != "reference"


@pytest.fixture
def exact_device(device, exact):
    if not exact:
        pytest.skip("the claim is of the kernels: the reference's attention is torch's")
    return device


@pytest.fixture
def triton_device(exact_device):
    if ak.backends.choose_backend(exact_device, "refinement").backend != "triton":
        pytest.skip("the claim is of the Triton kernels: on the CPU gradients are torch's matrix products")
    return exact_device


def projections(tokens, heads=2, key_heads=1, size=16, dtype=torch.float32, device="cpu"):
    """Query, key and value of random tokens."""
    return [
        torch.randn(tokens, n, size, dtype=torch.float64).to(device, dtype)
        for n in (heads, key_heads, key_heads)
    ]


def lay_out(xs, source):
    """The projections of the batch's tokens in a layout's slots; NaN at padding."""
    return [place(x.flatten(1), source).unflatten(1, x.shape[1:]) for x in xs]


def attended(batch, kind, xs, causal=True):
    """Results of the tokens of one sequence after the other."""
    layout, source = batch.lay_out(kind, xs[0].device)
    return sequence_attention(lay_out(xs, source), layout, causal)[sequence_slots(layout)]


def gradients(xs, outputs, grad=None):
    if grad is None:
        grad = torch.cos(torch.arange(outputs.numel(), device=outputs.device)).reshape(outputs.shape)
    return torch.autograd.grad(outputs, xs, grad.to(outputs))


# Against an fp64 evaluation


@given(
    batch=lengths_with_unread_prompts(),
    kind=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from(HEAD_SIZES[1:]),
    merged=st.booleans(),
)
@generated
def test_error_bound_holds_for_grouped_heads_on_any_layout(device, batch, kind, dtype, size, merged):
    torch.manual_seed(size)
    operation = attend(merged, heads=4, key_heads=2)
    compare(operation, operation.draw(batch, size, 1), batch, kind, dtype, device)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in PACKED] + [("padded_left", torch.bfloat16)]
    if INTERPRETED
    else [(kind, dtype) for kind in PACKED for dtype in DTYPES],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_error_bound_holds_in_both_directions(causal, kind, dtype, device):
    operation = attend(heads=4, key_heads=2, causal=causal)
    compare(operation, operation.draw(BATCH, 24, 1), BATCH, kind, dtype, device)


@pytest.mark.parametrize(
    ("size", "dtype"),
    # Of one feature in half precision, the rounding of the kept result, over which other heads average, is all there is.
    # The interpreter has time for every size and every dtype, not for every pair of them.
    [(size, DTYPES[i % 3]) for i, size in enumerate(HEAD_SIZES)]
    if INTERPRETED
    else [(size, dtype) for size in HEAD_SIZES for dtype in DTYPES if size > 1 or dtype == torch.float32],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_error_bound_holds_for_any_head_size(size, dtype, device):
    batch = Batch((6, 3), ((70, 1), ()))
    compare(grouped, grouped.draw(batch, size, 1), batch, "shared", dtype, device)


@pytest.mark.parametrize("scale", [0.02, 0.25, 1])
@pytest.mark.parametrize("kind", ["shared"] if INTERPRETED else LAYOUTS)
def test_error_bound_holds_for_any_scale(scale, kind, device):
    batch = Batch((9, 0), ((5, 1), (66,)))
    operation = attend(heads=4, key_heads=2, scale=scale)
    compare(operation, operation.draw(batch, 16, 1), batch, kind, torch.float32, device)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_scores_of_any_size_overflow_nothing(size, device):
    """Scores of some thousands, of which the largest decides alone."""
    q, k, v = projections(BATCH.num_tokens, device=device, size=size)
    xs = [(100 * q).requires_grad_(), (100 * k).requires_grad_(), v.requires_grad_()]
    out = attended(BATCH, "shared", xs)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in gradients(xs, out))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_prompt_that_nobody_reads_attends_to_itself(causal, device):
    if causal:
        layout = SequenceLayout.shared_prompts([66, 3], [[], [2]], device)
    else:
        layout = SequenceLayout.packed([0, 3], [66, 2], device)  # alike, of a sequence
    xs = projections(71, 4, 2, device=device)
    own = [x[:66].double().cpu() for x in xs]
    rows = [naive.Sequence(list(range(66)), [False] * 66)]
    expected = naive.sequence_attention(*(x.flatten(1) for x in own), rows, 4, causal, 2)
    assert torch.allclose(sequence_attention(xs, layout, causal)[:66].cpu().double(), expected, atol=1e-5)


# Queries of the responses alone


def assert_chosen_queries_are_rows_of_all(layout, device, dtype, exact):
    """Of results bit for bit where `exact`, of gradients up to the order of sums."""
    everything = [x.requires_grad_() for x in projections(layout.num_tokens, dtype=dtype, device=device)]
    rows = layout.response_attention.rows
    chosen = [x.detach().clone().requires_grad_() for x in everything]
    full = sequence_attention(everything, layout)
    part = sequence_attention([chosen[0][rows], *chosen[1:]], layout, queries="response")
    assert part.shape == (len(rows), 2, 16)
    assert part.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert torch.equal(part, full[rows]) if exact else torch.allclose(part, full[rows], atol=tolerance)
    grad = torch.randn_like(part)
    expected = gradients(everything, full, torch.zeros_like(full).index_copy(0, rows, grad))
    for x, y in zip(gradients(chosen, part, grad), expected, strict=True):
        assert (x - y).abs().max() <= 10 * tolerance * max(1.0, float(y.abs().max()))


@stored_layouts
def test_queries_of_responses_are_rows_of_the_whole(kind, dtype, device, exact):
    assert_chosen_queries_are_rows_of_all(BATCH.lay_out(kind, device)[0], device, dtype, exact)


@given(data=st.data())
@generated
def test_queries_of_several_turns_are_rows_of_the_whole(device, exact, data):
    """Response tokens lie apart, in padded rows that begin anywhere."""
    length = data.draw(st.integers(1, 100))
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, length)), min_size=1, max_size=3)
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    attention = torch.zeros(len(spans), length)
    response = (torch.rand(len(spans), length, generator=generator) < 0.4).float()
    for b, (start, count) in enumerate(spans):
        attention[b, start : start + count] = 1
        response[b, start] = 1
    layout = SequenceLayout.padded(attention.to(device), response.to(device))
    assert_chosen_queries_are_rows_of_all(layout, device, torch.float32, exact)


def test_queries_of_responses_of_merged_keys_and_values(device, exact):
    layout, _ = BATCH.lay_out("shared", device)
    rows = layout.response_attention.rows
    query, key, value = projections(layout.num_tokens, device=device)
    apart = sequence_attention([query[rows], key, value], layout, queries="response")
    merged = sequence_attention([query[rows], torch.stack([key, value], 1)], layout, queries="response")
    assert torch.equal(merged, apart)


def test_a_response_of_every_token_may_come_merged(device):
    layout = SequenceLayout.packed([0, 0], [3, 70], device)
    qkv = torch.randn(73, 3, 2, 16, device=device)
    assert torch.equal(
        sequence_attention([qkv], layout, queries="response"), sequence_attention([qkv], layout)
    )


# Bits


@dtypes
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_the_layout_never_changes_a_bit(dtype, causal, exact_device):
    xs = projections(BATCH.num_tokens, dtype=dtype, device=exact_device)
    first, *others = (attended(BATCH, kind, xs, causal) for kind in (LAYOUTS if causal else PACKED))
    assert all(torch.equal(first, other) for other in others)


@given(
    batch=lengths_with_unread_prompts(max_length=150),
    size=st.sampled_from([8, 80, 128]),
    dtype=st.sampled_from(DTYPES),
)
@generated
def test_no_layout_of_any_batch_changes_a_bit(exact_device, batch, size, dtype):
    xs = projections(batch.num_tokens, size=size, dtype=dtype, device=exact_device)
    first, *others = (attended(batch, kind, xs) for kind in LAYOUTS)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_rest_of_the_batch_never_changes_a_bit(kind, exact_device):
    xs = projections(BATCH.num_tokens, device=exact_device)
    whole = attended(BATCH, kind, xs)
    begin = 0
    for b, sequence in enumerate(BATCH.sequences):
        rows = torch.tensor(sequence.rows, device=exact_device)
        alone = attended(BATCH.only(b), "packed", [x[rows] for x in xs])
        assert torch.equal(whole[begin : begin + len(rows)], alone)
        begin += len(rows)


def in_other_memory(x):
    """The same numbers where they lie otherwise: heads first, features apart, spread out, off the boundaries."""
    apart = torch.empty(*x.shape[:2], 2 * x.shape[2], dtype=x.dtype, device=x.device)[..., ::2].copy_(x)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)
    wide = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2]), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 1:-2] = x
    return {
        "heads first": x.transpose(0, 1).contiguous()[None][0].transpose(0, 1),
        "features apart": apart,
        "off the boundaries": shifted,
        "within others": wide[:, 1:-2],
        "features first": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }


@dtypes
def test_where_projections_lie_changes_no_bit(dtype, exact_device):
    layout, _ = BATCH.lay_out("shared", exact_device)
    xs = projections(BATCH.num_tokens, dtype=dtype, device=exact_device)
    expected = sequence_attention(xs, layout)
    places = [in_other_memory(x) for x in xs]
    for name in places[0]:
        moved = [place[name] for place in places]
        assert all(torch.equal(x, y) for x, y in zip(moved, xs, strict=True))
        assert torch.equal(sequence_attention(moved, layout), expected), name


def test_launches_get_rows_from_where_they_are_compiled_for(triton_device):
    from adajudge_kernels.refinement import triton

    for x in in_other_memory(torch.randn(5, 2, 16, device=triton_device)).values():
        assert triton._rowwise(x).data_ptr() % 16 == 0


def test_where_projections_lie_changes_no_gradient(triton_device):
    device = triton_device
    layout, _ = BATCH.lay_out("shared", device)
    xs = [x.requires_grad_() for x in projections(BATCH.num_tokens, device=device)]
    grad = torch.randn(16, 2, BATCH.num_tokens, device=device).permute(2, 1, 0)  # features first, too
    expected = gradients(xs, sequence_attention(xs, layout), grad)
    places = [in_other_memory(x.detach()) for x in xs]
    for name in places[0]:
        moved = [place[name].requires_grad_() for place in places]
        got = gradients(moved, sequence_attention(moved, layout), grad)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), name


def test_merged_and_apart_are_the_same_bits(triton_device):
    layout, _ = BATCH.lay_out("shared", triton_device)
    xs = projections(BATCH.num_tokens, 2, 2, device=triton_device)
    results = []
    for form in (
        lambda q, k, v: [q, k, v],
        lambda q, k, v: [q, torch.stack([k, v], 1)],
        lambda *x: [torch.stack(x, 1)],
    ):
        leaves = [x.detach().requires_grad_() for x in xs]
        out = sequence_attention(form(*leaves), layout)
        results.append([out, *gradients(leaves, out)])
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@layouts
def test_two_runs_give_the_same_gradients(kind, device):
    layout, source = BATCH.lay_out(kind, device)
    xs = projections(BATCH.num_tokens, dtype=torch.bfloat16, device=device)
    runs = []
    for _ in range(2):
        leaves = [x.requires_grad_() for x in lay_out(xs, source)]
        runs.append(gradients(leaves, sequence_attention(leaves, layout)))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


# Who sees whom


def candidates(kind, device):
    """The layout of BATCH, and for each sequence the slots of its response."""
    layout, source = BATCH.lay_out(kind, device)
    slots = [
        torch.arange(last + 1 - count, last + 1, device=device)
        for last, count in zip(layout.last_response.tolist(), layout.response_lengths.tolist(), strict=True)
    ]
    return layout, source, slots


def with_other_keys(xs, slots, value=None):
    """The projections with other keys and values in some slots."""
    query, *rest = (x.clone() for x in xs)
    for x in rest:
        x[slots] = torch.randn_like(x[slots]) if value is None else value
    return [query, *rest]


@layouts
@pytest.mark.parametrize("value", [float("nan")] if INTERPRETED else [None, float("nan"), float("inf")])
def test_a_candidate_changes_no_other_bit(kind, value, device):
    """Nor the prompt's, not even by NaN; nor what reaches the other responses' gradients."""
    layout, source, slots = candidates(kind, device)
    xs = lay_out(projections(BATCH.num_tokens, device=device), source)
    clean = [x.detach().requires_grad_() for x in xs]
    out = sequence_attention(clean, layout)
    expected = gradients(clean, out)
    for chosen in (0, 1, 4):
        changed = [x.requires_grad_() for x in with_other_keys(xs, slots[chosen], value)]
        result = sequence_attention(changed, layout)
        others = torch.cat([x for b, x in enumerate(slots) if b != chosen])
        assert torch.equal(result[others], out[others])
        assert not torch.equal(result[slots[chosen]], out[slots[chosen]])
        for x, y in zip(gradients(changed, result), expected, strict=True):
            assert torch.equal(x[others], y[others])
        prompts = layout.roles == 1
        if kind != "shared":  # there, every sequence has a prompt of its own
            start, stop = layout.ranges[chosen, :2].tolist()
            prompts[start:stop] = False
        assert torch.equal(result[prompts], out[prompts])


def test_a_later_token_changes_no_earlier_bit_of_its_sequence(device):
    layout, source, slots = candidates("packed", device)
    xs = lay_out(projections(BATCH.num_tokens, device=device), source)
    out = sequence_attention(xs, layout)
    late = slots[0][40:]
    result = sequence_attention(with_other_keys(xs, late), layout)
    assert torch.equal(result[: late[0]], out[: late[0]])
    assert not torch.equal(result[late], out[late])


def test_a_prompt_learns_from_every_candidate(device):
    """Its keys' gradient is the sum of those that the candidates give it one by one."""
    xs = [x.requires_grad_() for x in projections(12, dtype=torch.float64, device=device)]
    layout = SequenceLayout.shared_prompts([5], [[4, 1, 2]], device)
    out = sequence_attention(xs, layout)
    parts = []
    for begin, stop in ((0, 5), (5, 9), (9, 10), (10, 12)):
        grad = torch.zeros_like(out)
        grad[begin:stop] = 1
        parts.append(gradients(xs, sequence_attention(xs, layout), grad))
    for x, *summands in zip(gradients(xs, out, torch.ones_like(out)), *parts, strict=True):
        assert torch.allclose(x, sum(summands), atol=1e-12)
    assert all(part[1][:5].any() for part in parts)
