"""The contract's bound (docs/model.md) on errors against fp64, for every operation on every backend."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import adajudge_kernels as ak
from tests.kernels.batches import LAYOUTS, LONG, RAGGED, Batch, batches, drawn_widths
from tests.kernels.cases import DTYPES, dtypes, generated, pooling, rowwise, stored_layouts, tokenwise
from tests.kernels.comparison import (
    assert_within_contract,
    cast,
    compare,
    compare_rowwise,
    far_from_zero,
    run_truth,
    usual_errors,
)
from tests.kernels.conftest import INTERPRETED
from tests.kernels.naive import Sequence
from tests.kernels.operations import (
    POOLING,
    call_experts,
    call_loss,
    draw_experts,
    draw_loss,
    draw_views,
    true_experts,
    true_loss,
    views,
)


@tokenwise
@stored_layouts
@pytest.mark.parametrize("batch", [RAGGED, LONG], ids=["ragged", "long"])
def test_error_is_at_most_twice_that_of_plain_pytorch(operation, kind, dtype, batch, device):
    compare(operation, operation.draw(batch, 48, 3), batch, kind, dtype, device)


@tokenwise
@given(batch=batches(), kind=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES), d=drawn_widths(70))
@generated
def test_error_bound_holds_on_any_layout(operation, device, batch, kind, dtype, d):
    # Tensor cores read probabilities in half precision: over few features of a head these roundings do not average.
    averaged = d >= 16 or dtype == torch.float32 or device.type == "cpu"
    assume(averaged or not operation.name.startswith("sequence_attention"))
    torch.manual_seed(d)
    compare(operation, operation.draw(batch, d, 2), batch, kind, dtype, device)


@pooling
@pytest.mark.parametrize(
    ("shift", "dtype"),
    [("mean", torch.bfloat16), ("outlier", torch.float32)]
    if INTERPRETED
    else [(shift, dtype) for shift in ("mean", "outlier") for dtype in DTYPES],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_error_bound_holds_for_states_as_models_have_them(operation, dtype, shift, device):
    """With a mean far from zero, or one feature far larger than the others: long sums of numbers of one sign."""
    batch = Batch((0, 300), ((300,), (260, 5)))
    compare(operation, far_from_zero(operation.draw(batch, 40, 2), shift), batch, "shared", dtype, device)


@pytest.mark.parametrize("peak", [1, 10], ids=["even weights", "one token has most of the weight"])
@pytest.mark.parametrize("tokens", ["all", "response"])
def test_the_usual_error_is_that_of_plain_pytorch(tokens, peak, device):
    """One case may be lucky; the median of many is not. Where one token has most of the weight, its gradient is the small
    difference of two large numbers."""
    operation, batch = views(tokens), Batch((14, 0), ((36, 19), (40,)))

    def draw():
        inputs = operation.draw(batch, 48, 2)
        return inputs | {"weight": peak * inputs["weight"]}

    for value, (usual, plain) in usual_errors(
        operation, draw, batch, device, 24 if INTERPRETED else 60
    ).items():
        assert usual <= 2 * plain + 1e-8, value


@pooling
@pytest.mark.parametrize("depths", range(1, 9))
def test_one_to_eight_depths(operation, depths, device):
    compare(operation, operation.draw(RAGGED, 20, depths), RAGGED, "shared", torch.float32, device)


# In the interpreter the widest rows take seconds: one operation of each kind of scan.
WIDTHS = [
    (operation, d)
    for operation in POOLING
    for d in ([1, 2, 31, 257, 16384] if INTERPRETED else [1, 2, 3, 31, 257, 1000, 4096, 5120, 16384])
    if not INTERPRETED or d < 16384 or operation.name in ("depth_gate", "multi_view_pool[all]")
]


@pytest.mark.parametrize(("operation", "d"), WIDTHS, ids=lambda x: str(getattr(x, "name", x)))
def test_any_number_of_features(operation, d, device):
    batch = Batch((2, 0), ((1, 3), (2,)))
    compare(operation, operation.draw(batch, d, 2), batch, "packed", torch.float32, device)


@pytest.mark.parametrize("d", [5120, 8192])
def test_long_sequences_of_wide_rows(d, device):
    """As models of ten billion weights and more have them."""
    operation = views("all")
    compare(operation, operation.draw(LONG, d, 3), LONG, "shared", torch.bfloat16, device)


@rowwise
@dtypes
@pytest.mark.parametrize("rows", [1, 7, 18 if INTERPRETED else 64])
def test_rowwise_error_is_at_most_twice_that_of_plain_pytorch(name, draw, call, truth, dtype, rows, device):
    compare_rowwise(name, call, truth, draw(rows), dtype, device)


EXPERT_SIZES = [(1, 1, 1), (3, 5, 2), (1030, 17, 9)]
EXPERT_SIZES += [(100, 70, 40), (2100, 3, 2)] if INTERPRETED else [(200, 270, 300), (16384, 3, 2)]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (size, dtype)
        for size in EXPERT_SIZES
        for dtype in (DTYPES[:1] if INTERPRETED and size[0] > 1000 else DTYPES)
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_experts_of_any_width(size, dtype, device):
    compare_rowwise(
        "gated_expert_combination", call_experts, true_experts, draw_experts(3, *size), dtype, device
    )


@dtypes
@pytest.mark.parametrize(("pairs", "sequences"), [(2500, 5000), (1, 1500), (1024, 1)])
def test_loss_of_many_pairs_and_any_number_of_sequences(pairs, sequences, dtype, device):
    inputs = draw_loss(pairs)
    inputs["view_weights"] = torch.softmax(3 * torch.randn(sequences, 3, dtype=torch.float64), dim=1)
    compare_rowwise("focal_bradley_terry_loss", call_loss, true_loss, inputs, dtype, device)


def test_loss_of_a_hundred_thousand_pairs(device):
    chosen, rejected = torch.randn(2, 100_000, device=device)
    loss = ak.focal_bradley_terry_loss(chosen, rejected, gamma=0.0)
    exact = -torch.nn.functional.logsigmoid((chosen - rejected).double()).mean()
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("of_weights", [*DTYPES, None], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_experts_take_tensors_of_different_dtypes(of_weights, device):
    """Weights and biases in one, the rest in fp32; or every tensor in one of its own."""
    drawn = draw_experts(5)
    own = {
        name: (of_weights if "weight" in name or "bias" in name else torch.float32)
        if of_weights
        else DTYPES[i % 3]
        for i, name in enumerate(drawn)
    }
    inputs = {name: cast({name: x}, own[name], device)[name] for name, x in drawn.items()}
    outputs, gradients = run_truth(call_experts, inputs)
    exact, true_gradients = run_truth(
        true_experts, cast({k: x.detach() for k, x in inputs.items()}, torch.float64)
    )
    assert {out.dtype for out in outputs} == {torch.float32}
    assert all(torch.allclose(a.cpu().double(), b, atol=1e-5) for a, b in zip(outputs, exact, strict=True))
    for name, gradient in gradients.items():
        assert gradient.dtype == own[name], name
        assert torch.allclose(gradient.cpu().double(), true_gradients[name], rtol=2**-6, atol=1e-4), name


@tokenwise
def test_one_token_responses_without_prompt(operation, device):
    batch = Batch((0, 0), ((1, 1), (1,)))
    compare(operation, operation.draw(batch, 16, 2), batch, "shared", torch.float32, device)


@pytest.mark.parametrize("tokens", ["all", "response"])
@given(data=st.data())
@generated
def test_any_response_mask_of_several_turns(tokens, device, data):
    length = data.draw(st.integers(1, 24))
    spans = data.draw(
        st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, length)), min_size=1, max_size=4)
    )
    attention, response = torch.zeros(len(spans), length), torch.zeros(len(spans), length)
    sequences = []
    for b, (start, count) in enumerate(spans):
        columns = list(range(start, min(start + count, length)))
        marked = data.draw(st.lists(st.booleans(), min_size=len(columns), max_size=len(columns)))
        marked[data.draw(st.integers(0, len(columns) - 1))] = True
        attention[b, columns] = 1
        response[b, columns] = torch.tensor(marked).float()
        sequences.append(Sequence([b * length + c for c in columns], marked))
    response[attention == 0] = 1  # what a response mask says of padding does not matter
    batch = Batch((0,), ((len(spans) * length,),))  # one token per slot
    inputs = draw_views(batch, 9, 2)
    inputs["alpha"] = torch.softmax(torch.randn(len(spans), 2, dtype=torch.float64), dim=1)
    layout = ak.SequenceLayout.padded(attention.to(device), response.to(device))
    operation = views(tokens)
    ours = run_truth(operation.call, cast(inputs, torch.float32, device), layout)
    assert_within_contract(
        ours,
        operation.truth,
        {n: x.float() for n, x in inputs.items()},
        operation.name,
        torch.float32,
        sequences,
    )
