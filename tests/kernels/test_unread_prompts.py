"""What only responses decide: prompts are not read for it, and get no gradient of it."""

import pytest
import torch

import adajudge_kernels as ak
from tests.kernels.batches import LAYOUTS, RAGGED, Batch
from tests.kernels.comparison import cast, run_operation
from tests.kernels.operations import POOLING, over_tokens


@pytest.mark.parametrize("operation", [POOLING[i] for i in (2, 3, 7)], ids=lambda op: op.name)
@pytest.mark.parametrize(("kind", "d"), [*((kind, 12) for kind in LAYOUTS), ("shared", 9000)])
def test_what_only_responses_decide_reads_no_prompt(operation, kind, d, device):
    batch = RAGGED if d == 12 else Batch((2, 0), ((1, 3), (2,)))
    layout, source = batch.lay_out(kind, device)
    prompt = torch.ones(batch.num_tokens, dtype=torch.bool)
    for sequence in batch.sequences:
        prompt[[row for row, r in zip(sequence.rows, sequence.response, strict=True) if r]] = False
    clean = cast(operation.draw(batch, d, 2), torch.float32, device)
    poisoned = {
        name: x.detach().masked_fill(prompt.to(device)[:, None], float("nan")).requires_grad_()
        if over_tokens(name)
        else x.detach().requires_grad_()
        for name, x in clean.items()
    }
    expected, got = (run_operation(operation, x, layout, source) for x in (clean, poisoned))
    assert all(torch.equal(a, b) for a, b in zip(expected[0], got[0], strict=True))
    assert all(torch.equal(expected[1][name], got[1][name]) for name in clean)


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_no_gradient_of_responses_reaches_a_prompt_however_large_it_is(kind, device):
    batch = Batch((3,), ((2, 1),))
    layout, source = batch.lay_out(kind, device)
    states = torch.randn(layout.num_tokens, 8, device=device, requires_grad=True)
    weight, bias = torch.randn(8, device=device), torch.zeros(1, device=device)
    alpha = torch.ones(2, 1, device=device)
    views = ak.multi_view_pool([states], alpha, weight, bias, layout, "response")
    views.attention.backward(torch.full((2, 8), float("inf"), device=device))
    prompt = (source >= 0) & (source < 3)
    assert (states.grad[prompt] == 0).all()
    assert not states.grad[~prompt].isfinite().all()


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_nor_does_the_attention_weight_however_large_it_is(kind, device):
    batch = Batch((3,), ((2, 1),))
    layout, source = batch.lay_out(kind, device)
    states = torch.randn(layout.num_tokens, 8, device=device, requires_grad=True)
    weight, bias = torch.full((8,), float("inf"), device=device), torch.zeros(1, device=device)
    ak.attention_pool(states, weight, bias, layout, "response").backward(torch.ones(2, 8, device=device))
    prompt = (source >= 0) & (source < 3)
    assert (states.grad[prompt] == 0).all()
    assert states.grad[~prompt].isnan().any()
