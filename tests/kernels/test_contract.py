"""The contract of docs/model.md beside its bound on errors (test_accuracy.py): one property a test, for every operation and
backend."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adajudge_kernels as ak
from tests.kernels.batches import LAYOUTS, LONG, RAGGED, Batch, batches, drawn_widths, place
from tests.kernels.cases import dtypes, generated, layouts, pooling, rowwise, tokenwise
from tests.kernels.comparison import cast, run_operation, run_truth, weighted_sum
from tests.kernels.conftest import EMULATED, INTERPRETED
from tests.kernels.operations import call_experts, draw_experts, over_tokens


@pooling
@dtypes
def test_outputs_are_fp32_and_gradients_in_their_inputs_dtype(operation, dtype, device):
    layout, source = RAGGED.lay_out("padded_left", device)
    tokens = cast(operation.draw(RAGGED, 12, 2), dtype, device)
    outputs, gradients = run_operation(operation, tokens, layout, source)
    assert {out.dtype for out in outputs} == {torch.float32}
    assert {g.dtype for g in gradients.values()} == {dtype}


@tokenwise
@pytest.mark.parametrize("kind", ["packed", "shared"] if INTERPRETED else LAYOUTS)
def test_two_runs_are_bit_identical(operation, kind, device):
    inputs = operation.draw(LONG, 64, 3)
    layout, source = LONG.lay_out(kind, device)
    first, second = (
        run_operation(operation, cast(inputs, torch.bfloat16, device), layout, source) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(first[1][name], second[1][name]) for name in inputs)


@rowwise
def test_two_rowwise_runs_are_bit_identical(name, draw, call, truth, device):
    inputs = draw(9)
    first, second = (run_truth(call, cast(inputs, torch.float32, device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(first[1][key], second[1][key]) for key in inputs)


@pooling
def test_the_number_of_threads_never_changes_a_bit(operation, device):
    layout, _ = LONG.lay_out("shared", device)
    inputs = {name: x.to(device, torch.float32) for name, x in operation.draw(LONG, 300, 3).items()}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(operation.call(inputs, layout))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def outputs_by_layout(operation, inputs, batch, dtype, device):
    for kind in LAYOUTS:
        layout, source = batch.lay_out(kind, device)
        placed = {
            name: place(x.to(device, dtype), source) if over_tokens(name) else x.to(device, dtype)
            for name, x in inputs.items()
        }
        yield operation.call(placed, layout)


@pooling
@dtypes
@given(batch=batches(max_length=150), d=st.sampled_from([1, 7, 64, 130]))
@generated
def test_layout_never_changes_a_bit(operation, dtype, device, batch, d):
    first, *others = outputs_by_layout(operation, operation.draw(batch, d, 2), batch, dtype, device)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pooling
@given(batch=batches(max_length=150), d=st.sampled_from([1, 7, 64, 130]))
@generated
def test_the_rest_of_the_batch_never_changes_a_bit(operation, device, batch, d):
    inputs = {name: x.to(device, torch.bfloat16) for name, x in operation.draw(batch, d, 2).items()}
    whole = operation.call(inputs, batch.lay_out("shared", device)[0])
    for b, sequence in enumerate(batch.sequences):
        rows = torch.tensor(sequence.rows, device=device)
        own = {name: x[rows] if over_tokens(name) else x for name, x in inputs.items()}
        if "alpha" in own:
            own["alpha"] = own["alpha"][b : b + 1]
        alone = operation.call(own, batch.only(b).lay_out("packed", device)[0])
        assert all(torch.equal(a[b], c[0]) for a, c in zip(whole, alone, strict=True))


@given(rows=st.integers(2, 40), d=drawn_widths(200), h=drawn_widths(70))
@generated
def test_the_rest_of_the_batch_never_changes_a_reward(device, rows, d, h):
    inputs = {k: x.to(device, torch.float32) for k, x in draw_experts(rows, d, h, h + 3).items()}
    whole = call_experts(inputs)
    for b in range(rows):
        alone = call_experts(
            {
                k: x[b : b + 1] if k in ("last", "mean", "attention", "prompt") else x
                for k, x in inputs.items()
            }
        )
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(whole, alone, strict=True))


@tokenwise
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["padded_left", "padded_right"])
def test_padding_reaches_no_output_and_no_gradient(operation, poison, kind, device):
    layout, source = RAGGED.lay_out(kind, device)
    tokens = cast(operation.draw(RAGGED, 12, 2), torch.float32, device)
    placed = {
        name: torch.where((source >= 0)[:, None], x[source.clamp(min=0)], poison).detach().requires_grad_()
        if over_tokens(name)
        else x
        for name, x in tokens.items()
    }
    outputs = operation.call(placed, layout)
    weighted_sum(outputs).backward()
    assert all(out.isfinite().all() for out in outputs)
    for name, x in placed.items():
        if x.grad is not None:
            assert x.grad.isfinite().all(), name
            assert not over_tokens(name) or not x.grad[source < 0].any()


@pytest.mark.parametrize("few", [False, True], ids=["a whole run", "some"])
def test_logits_of_minus_infinity_are_weights_of_zero(few, device):
    """Finite states whose logits overflow: the softmax is over what is left."""
    batch = Batch((0,), ((700,),))
    states = torch.ones(batch.num_tokens, 4, device=device)
    states[: 10 if few else 300, 0] = 1e30
    weight = torch.tensor([-1e30, 0.0, 0.0, 0.0], device=device)
    layout, _ = batch.lay_out("packed", device)
    states.requires_grad_()
    arguments = (
        [states],
        torch.ones(1, 1, device=device),
        weight,
        torch.full((1,), 1e30, device=device),
        layout,
    )
    views = ak.multi_view_pool(*arguments)
    assert torch.equal(views.attention, torch.ones(1, 4, device=device))
    expected = states.detach().double().mean(dim=0, keepdim=True).float()
    assert torch.allclose(views.mean, expected, rtol=1e-6)
    views.attention[:, 1].sum().backward()
    assert states.grad.isfinite().all()


@tokenwise
@layouts
def test_an_empty_batch(operation, kind, device):
    batch = Batch((), ())
    layout, source = batch.lay_out(kind, device)
    outputs, gradients = run_operation(
        operation, cast(operation.draw(batch, 8, 2), torch.float32, device), layout, source
    )
    assert all(out.shape[0] == 0 for out in outputs)
    assert all(g is None or not g.any() for g in gradients.values())


@rowwise
def test_no_rows(name, draw, call, truth, device):
    outputs, _ = run_truth(call, cast(draw(0), torch.float32, device))
    assert all(out.numel() == 0 or float(out) == 0.0 for out in outputs)


@tokenwise
def test_gradcheck(operation, device):
    batch = Batch((2, 0), ((3, 1), (2,)))
    for kind in ("padded_left", "shared") if INTERPRETED else LAYOUTS:
        layout, source = batch.lay_out(kind, device)
        drawn = cast(operation.draw(batch, 5, 2), torch.float64, device)

        def call(*values, names=tuple(drawn), layout=layout, source=source):
            x = dict(zip(names, values, strict=True))
            return operation.call(
                {n: place(v, source) if over_tokens(n) else v for n, v in x.items()}, layout
            )

        # The interpreter takes minutes for every entry of every Jacobian: there, a random combination of them.
        assert torch.autograd.gradcheck(call, tuple(drawn.values()), fast_mode=INTERPRETED or EMULATED)


@rowwise
def test_rowwise_gradcheck(name, draw, call, truth, device):
    drawn = cast(draw(3), torch.float64, device)
    assert torch.autograd.gradcheck(
        lambda *values: call(dict(zip(drawn, values, strict=True))),
        tuple(drawn.values()),
        fast_mode=INTERPRETED or EMULATED,
    )


def differentiate_twice(outputs, x):
    (gradient,) = torch.autograd.grad(weighted_sum(outputs), x, create_graph=True)
    gradient.sum().backward()


@tokenwise
def test_double_backward_is_a_clear_error(operation, device):
    layout, _ = RAGGED.lay_out("shared", device)
    inputs = cast(operation.draw(RAGGED, 6, 2), torch.float32, device)
    x = next(iter(inputs.values()))
    outputs = [out * out for out in operation.call(inputs, layout)]
    with pytest.raises(RuntimeError, match="no second derivative"):
        differentiate_twice(outputs, x)


@rowwise
def test_double_backward_of_rowwise_operations_is_a_clear_error(name, draw, call, truth, device):
    inputs = cast(draw(3), torch.float32, device)
    with pytest.raises(RuntimeError, match="no second derivative"):
        differentiate_twice(call(inputs), next(iter(inputs.values())))


@tokenwise
def test_autocast_changes_nothing(operation, device):
    layout, source = RAGGED.lay_out("packed", device)
    inputs = operation.draw(RAGGED, 16, 2)
    plain = run_operation(operation, cast(inputs, torch.float32, device), layout, source)
    with torch.autocast(device.type, torch.bfloat16):
        cast_run = run_operation(operation, cast(inputs, torch.float32, device), layout, source)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], cast_run[0], strict=True))
    assert all(torch.equal(plain[1][name], cast_run[1][name]) for name in inputs)


@contextmanager
def deterministic_algorithms():
    """Torch fills memory that it hands out with NaN then, as a reused block may be full of them."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@tokenwise
@pytest.mark.parametrize("kind", ["padded_left", "shared"] if INTERPRETED else LAYOUTS)
def test_deterministic_algorithms_are_honoured_and_memory_is_written_before_it_is_read(
    operation, kind, device
):
    layout, source = LONG.lay_out(kind, device)
    inputs = operation.draw(LONG, 32, 3)
    expected = run_operation(operation, cast(inputs, torch.float32, device), layout, source)
    with deterministic_algorithms():
        assert torch.empty(1, device=device).isnan()
        got = run_operation(operation, cast(inputs, torch.float32, device), layout, source)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], got[0], strict=True))
    assert all(torch.equal(expected[1][name], got[1][name]) for name in inputs)


@rowwise
def test_rowwise_memory_is_written_before_it_is_read(name, draw, call, truth, device):
    inputs = draw(9)
    expected = run_truth(call, cast(inputs, torch.float32, device))
    with deterministic_algorithms():
        got = run_truth(call, cast(inputs, torch.float32, device))
    assert all(torch.equal(a, b) for a, b in zip(expected[0], got[0], strict=True))
    assert all(torch.equal(expected[1][key], got[1][key]) for key in inputs)


@pooling
def test_backward_keeps_the_inputs_and_numbers_per_sequence(operation, device):
    """Nothing of size [T, d] is saved beyond the states themselves; the rest is O(B d), whatever T is."""
    layout, _ = LONG.lay_out("shared", device)
    inputs = cast(operation.draw(LONG, 64, 3), torch.float32, device)
    own = {x.data_ptr() for x in inputs.values()} | {x.data_ptr() for x in layout.tables}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        operation.call(inputs, layout)
    new = [x for x in saved if x.data_ptr() not in own]
    assert sum(x.numel() for x in new) <= 2 * layout.num_sequences * (64 + 8)


@pytest.mark.parametrize("margin", [0.0, 30.0, 1e2, 1e4, -1e2, -1e4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_loss_is_stable_for_extreme_margins(margin, gamma, device):
    chosen = torch.tensor([margin], device=device, requires_grad=True)
    loss = ak.focal_bradley_terry_loss(chosen, torch.zeros(1, device=device), gamma=gamma)
    loss.backward()
    z = torch.tensor(margin, dtype=torch.float64)
    log_p, log_q = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    assert float(loss.detach()) == pytest.approx(
        float(-torch.exp(gamma * log_q) * log_p), rel=1e-5, abs=1e-30
    )
    assert chosen.grad.isfinite().all()
    assert float(chosen.grad) <= 0


def test_loss_without_focus_and_entropy_is_bradley_terry(device):
    chosen, rejected = torch.randn(2, 20, device=device)
    loss = ak.focal_bradley_terry_loss(chosen, rejected, gamma=0.0)
    assert torch.allclose(loss, -torch.nn.functional.logsigmoid(chosen - rejected).mean())


def test_entropy_gradient_is_finite_for_a_collapsed_router(device):
    logits = torch.tensor([[0.0, 500.0, -500.0]], device=device, requires_grad=True)
    rewards = torch.zeros(1, device=device)
    loss = ak.focal_bradley_terry_loss(rewards, rewards, view_weights=torch.softmax(logits, dim=1))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
