"""The layers and the head: identity at the start, one result on every layout, exact gradients."""

import pytest
import torch

import adajudge_kernels as ak
from tests.kernels.batches import LAYOUTS, RAGGED, Batch, place
from tests.kernels.conftest import INTERPRETED

BF16 = 0.06 if INTERPRETED else 0.03  # of rewards of order one; the interpreter's stores truncate


def random_head(d=24, dtype=torch.float32, **options):
    """A head whose zero-initialised parameters are random, so that every path matters."""
    head = ak.AdaJudgeHead(d, expert_hidden_size=12, router_hidden_size=10, **options)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.to(dtype)


def test_a_new_block_is_the_identity(device):
    layout, _ = RAGGED.lay_out("packed", device)
    hidden = torch.randn(layout.num_tokens, 24, device=device)
    assert torch.equal(ak.RefinementBlock(24).to(device)(hidden, layout), hidden)


def test_a_new_head_weighs_depths_and_views_alike(device):
    layout, _ = RAGGED.lay_out("packed", device)
    out = ak.AdaJudgeHead(24, num_blocks=3).to(device)(
        torch.randn(layout.num_tokens, 24, device=device), layout
    )
    assert torch.allclose(out.depth_weights, torch.full_like(out.depth_weights, 1 / 3))
    assert torch.allclose(out.view_weights, torch.full_like(out.view_weights, 1 / 3))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_stays_inside_the_sequence(causal, device):
    """Against dense attention, one sequence at a time."""
    layout, _ = RAGGED.lay_out("packed", device)
    q, k, v = torch.randn(3, layout.num_tokens, 2, 8, device=device)
    from adajudge_kernels.refinement.ops import sequence_attention

    out = sequence_attention([q, k, v], layout, causal)
    for start, stop, *_ in layout.ranges.tolist():
        own = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=causal).transpose(0, 1)
        assert torch.allclose(out[start:stop], expected, atol=1e-5)


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_every_layout_gives_the_same_rewards_and_parameter_gradients(tokens, device):
    head = random_head(num_blocks=2, attention_tokens=tokens).to(device)
    states = torch.randn(RAGGED.num_tokens, 24, device=device)
    results = []
    for kind in LAYOUTS:
        layout, source = RAGGED.lay_out(kind, device)
        leaf = states.clone().requires_grad_()
        head.zero_grad()
        out = head(place(leaf, source), layout)
        (out.reward * torch.arange(6.0, device=device)).sum().backward()
        gradients = {name: p.grad for name, p in head.named_parameters()} | {"hidden": leaf.grad}
        results.append((out, gradients))
    for out, gradients in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(out, results[0][0], strict=True))
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, results[0][1][name], atol=1e-4, rtol=1e-4), name


# In the interpreter a whole judge learns, and its every gradient is the reference's: tests/adajudge/test_judge_on_triton.py.
in_no_judge = pytest.mark.skipif(INTERPRETED, reason="test_judge_on_triton.py does so with a whole judge")


@in_no_judge
@pytest.mark.parametrize("kind", LAYOUTS)
def test_gradcheck_of_the_whole_head(kind, device):
    batch = Batch((2, 0), ((2, 1), (3,)))
    head = ak.AdaJudgeHead(4, num_blocks=2, num_heads=2, expert_hidden_size=3, router_hidden_size=3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    head = head.double().to(device)
    layout, source = batch.lay_out(kind, device)
    names = [name for name, _ in head.named_parameters()]

    def call(states, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return tuple(torch.func.functional_call(head, named, (place(states, source), layout)))

    states = torch.randn(batch.num_tokens, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(call, (states, *head.parameters()))


def test_the_head_takes_three_dimensional_states(device):
    layout, source = RAGGED.lay_out("padded_left", device)
    head = random_head().to(device)
    flat = place(torch.randn(RAGGED.num_tokens, 24, device=device), source)
    batched = flat.unflatten(0, layout.padded_shape)
    assert torch.equal(head(batched, layout).reward, head(flat, layout).reward)


def test_padding_with_nan_reaches_no_parameter(device):
    layout, source = RAGGED.lay_out("padded_right", device)
    head = random_head().to(device)
    hidden = place(torch.randn(RAGGED.num_tokens, 24, device=device), source).detach().requires_grad_()
    head(hidden, layout).reward.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert hidden.grad.isfinite().all()


def test_a_single_block_keeps_nan_out_of_padding(device):
    layout, source = RAGGED.lay_out("padded_right", device)
    block = ak.RefinementBlock(24).to(device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    out = block(place(torch.randn(RAGGED.num_tokens, 24, device=device), source), layout)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_a_bidirectional_head_refuses_shared_prompts(device):
    layout, _ = RAGGED.lay_out("shared", device)
    hidden = torch.randn(layout.num_tokens, 24, device=device)
    with pytest.raises(ValueError, match="causal=False came with a prompt-shared layout"):
        random_head(causal=False).to(device)(hidden, layout)


def test_bf16_states_with_fp32_parameters(device):
    layout, _ = RAGGED.lay_out("packed", device)
    head = random_head().to(device)
    hidden = torch.randn(layout.num_tokens, 24, device=device)
    out = head(hidden.bfloat16(), layout)
    assert out.reward.dtype == torch.float32
    assert torch.allclose(out.reward, head(hidden, layout).reward, atol=BF16)


def test_autocast_runs_the_head_on_fp32_states(device):
    layout, _ = RAGGED.lay_out("packed", device)
    head = random_head().to(device)
    hidden = torch.randn(layout.num_tokens, 24, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        out = head(hidden, layout)
    out.reward.sum().backward()
    assert out.reward.dtype == torch.float32
    assert torch.allclose(out.reward, head(hidden, layout).reward, atol=BF16)
    assert hidden.grad.dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(device):
    layout, _ = RAGGED.lay_out("shared", device)
    head = random_head().to(device).train()
    hidden = torch.randn(layout.num_tokens, 24, device=device)
    gradients, calls = [], []
    head.refinement.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        head.refinement.gradient_checkpointing = recompute
        head.zero_grad()
        calls.clear()
        head(hidden, layout).reward.sum().backward()
        gradients.append([p.grad.clone() for p in head.parameters()])
        assert len(calls) == (2 if recompute else 1)  # once more for the backward
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def losses_of_training(device, steps, d=24):
    """Forward, backward, optimiser, on a separable task: two of a prompt's four responses carry the evidence."""
    torch.manual_seed(0)
    layout, _ = Batch((4,), ((5,) * 4,)).lay_out("shared", device)
    head = ak.AdaJudgeHead(d, num_blocks=2, expert_hidden_size=12, router_hidden_size=10).to(device)
    optimiser = torch.optim.AdamW(head.parameters(), 1e-2)
    direction = torch.randn(d, device=device)
    losses = []
    for _ in range(steps):
        hidden = torch.randn(layout.num_tokens, d, device=device)
        hidden[4:14] += direction
        out = head(hidden, layout)
        loss = ak.focal_bradley_terry_loss(out.reward[:2], out.reward[2:], view_weights=out.view_weights)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@in_no_judge
def test_a_head_learns_to_prefer_as_it_does_on_the_reference(device):
    losses = losses_of_training(device, 20)
    assert losses[-1] < 0.2 * losses[0]
    with ak.use_backend("reference"):
        expected = losses_of_training(device, 20)
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_last_block_may_leave_out_what_no_view_reads(device):
    """With an attention view over the response, refining its tokens only gives what refining all gives."""
    head = random_head(num_blocks=2, attention_tokens="response").to(device)
    for kind in ("padded_left", "shared") if INTERPRETED else LAYOUTS:
        layout, source = RAGGED.lay_out(kind, device)
        results = []
        for read in ("all", "response"):
            torch.manual_seed(0)
            hidden = place(torch.randn(RAGGED.num_tokens, 24, device=device), source)
            hidden = hidden.nan_to_num().detach().requires_grad_()
            head.zero_grad()
            states, alpha, prompt = head.refinement(hidden, layout, read)
            reward = head.experts(head.pooling(states, alpha, layout), prompt).reward
            (reward * torch.arange(6.0, device=device)).sum().backward()
            gradients = [p.grad.clone() for p in head.parameters()]
            results.append([reward.detach(), hidden.grad, *gradients])
        for full, pruned in zip(*results, strict=True):
            assert torch.allclose(pruned, full, atol=1e-5 * max(1.0, float(full.abs().max())))


def test_the_last_block_computes_no_query_and_no_mlp_for_prompts(device):
    layout, _ = Batch((50,), ((3, 4),)).lay_out("shared", device)
    block = ak.RefinementBlock(24).to(device)
    with torch.profiler.profile(record_shapes=True) as profile:
        block(torch.randn(57, 24, device=device), layout, "response")
    products = [e.input_shapes[0][0] for e in profile.events() if e.name == "aten::mm"]
    assert sorted(products) == [7, 7, 7, 7, 57]  # query, output, gate and up, down; key and value


@pytest.mark.parametrize(("d", "heads"), [(24, 1), (96, 3), (257, 257), (300, 3), (1000, 8), (4096, 32)])
def test_every_width_has_heads_that_attention_serves(d, heads):
    assert ak.RefinementBlock(d).num_heads == heads
    layout = ak.SequenceLayout.packed([1], [2])
    assert ak.RefinementBlock(d, intermediate_size=8)(torch.zeros(3, d), layout).shape == (3, d)


def test_heads_that_attention_cannot_serve_are_refused_at_once():
    with pytest.raises(
        ValueError, match="num_heads: 2 came, which makes heads of 512 features; expected at most 256"
    ):
        ak.AdaJudgeHead(1024, num_heads=2)


def test_under_autocast_attention_is_in_its_dtype(device, monkeypatch):
    from adajudge_kernels import layers

    seen = []

    def spy(projections, *args, **options):
        seen.append(projections[0].dtype)
        return attend(projections, *args, **options)

    attend = layers.sequence_attention
    monkeypatch.setattr(layers, "sequence_attention", spy)
    layout, _ = RAGGED.lay_out("packed", device)
    hidden = torch.randn(layout.num_tokens, 24, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = ak.RefinementBlock(24).to(device)(hidden, layout)
    assert seen == [torch.bfloat16]
    assert out.dtype == torch.float32
