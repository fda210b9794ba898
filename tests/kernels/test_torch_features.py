"""Features of torch that people use around layers: checkpointing, hooks, meta tensors, tracing, batched gradients."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adajudge_kernels as ak
from tests.kernels.batches import RAGGED, place
from tests.kernels.operations import ATTENTION, POOLING, ROWWISE
from tests.kernels.test_layers import random_head

LAYERED = [*POOLING, *ATTENTION]
A_LAYOUT = ak.SequenceLayout.packed([3, 0], [2, 4])


def calls():
    """(name, function of a dict of tensors, how to draw that dict on a device)."""
    for operation in LAYERED:

        def run(x, operation=operation):
            return operation.call(x, A_LAYOUT.to(next(iter(x.values())).device))

        def draw(operation=operation):
            return operation.draw(SingleBatch, 8, 2)

        yield pytest.param(run, draw, id=operation.name)
    for name, draw, call, _ in ROWWISE:
        yield pytest.param(call, lambda draw=draw: draw(5), id=name)


class SingleBatch:
    """As much of a `Batch` as drawing needs."""

    num_tokens = 9
    sequences = ((3, 2), (0, 4))


def leaves(drawn, device):
    return {name: x.float().to(device).requires_grad_() for name, x in drawn.items()}


def total(outputs):
    return sum(
        (output * torch.arange(1.0, output.numel() + 1).to(output).view_as(output)).sum()
        for output in outputs
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("call", "draw"), list(calls()))
def test_checkpointing_changes_no_gradient(call, draw, reentrant, device):
    torch.manual_seed(0)
    inputs = leaves(draw(), device)
    names = list(inputs)

    def function(*values):
        return call(dict(zip(names, values, strict=True)))

    kept = torch.autograd.grad(total(function(*inputs.values())), inputs.values(), allow_unused=True)
    loss = total(checkpoint(function, *inputs.values(), use_reentrant=reentrant))
    loss.backward()
    for leaf, expected in zip(inputs.values(), kept, strict=True):
        assert (leaf.grad is None and expected is None) or torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_hooks_reach_every_projection(tokens, device):
    """What accelerate's offloading, quantisation and activation statistics rely on."""
    layout, source = RAGGED.lay_out("padded_right", device)
    head = random_head(num_blocks=2, attention_tokens=tokens).to(device)
    seen = set()
    for name, module in head.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: seen.add(name))
    hidden = place(torch.randn(RAGGED.num_tokens, 24, device=device), source)
    head(hidden, layout)
    layers = ("qkv", "output", "gate_up", "down")
    assert seen == {f"refinement.blocks.{k}.{layer}" for k in range(2) for layer in layers}


class Doubled(nn.Module):
    """Another library's layer around ours: it knows `forward(x)` only."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_a_layer_in_a_projections_place_is_used(tokens, device):
    layout, source = RAGGED.lay_out("packed", device)
    head = random_head(num_blocks=1, attention_tokens=tokens).to(device)
    hidden = place(torch.randn(RAGGED.num_tokens, 24, device=device), source)
    block = head.refinement.blocks[0]
    for name in ("qkv", "output", "gate_up", "down"):
        projection = getattr(block, name)
        setattr(block, name, Doubled(projection))
        replaced = head(hidden, layout).reward
        setattr(block, name, projection)
        with torch.no_grad():
            projection.weight *= 2
        assert torch.allclose(replaced, head(hidden, layout).reward, atol=1e-4), name
        with torch.no_grad():
            projection.weight /= 2


def test_a_head_made_on_meta_starts_as_a_new_one():
    with torch.device("meta"):
        head = ak.AdaJudgeHead(24, num_blocks=2)
    head = head.to_empty(device="cpu")
    for parameter in head.parameters():
        nn.init.constant_(parameter, 7.0)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    new = ak.AdaJudgeHead(24, num_blocks=2)
    for (name, ours), theirs in zip(head.named_parameters(), new.parameters(), strict=True):
        assert bool((ours == ours.flatten()[0]).all()) == bool((theirs == theirs.flatten()[0]).all()), name
        size = ours.numel() ** 0.5
        assert abs(ours.mean() - theirs.mean()).item() <= 6 * theirs.std(unbiased=False).item() / size, name
        assert ours.std(unbiased=False).item() == pytest.approx(theirs.std(unbiased=False).item(), rel=0.3), (
            name
        )


@pytest.mark.parametrize("kind", ["padded_left", "packed", "shared"])
@pytest.mark.parametrize("tokens", ["all", "response"])
def test_a_head_on_meta_gives_shapes(kind, tokens):
    layout, _ = RAGGED.lay_out(kind, torch.device("cpu"))
    head = ak.AdaJudgeHead(24, attention_tokens=tokens).to("meta")
    hidden = torch.empty(layout.num_tokens, 24, device="meta", requires_grad=True)
    out = head(hidden, layout.to("meta"))
    assert [tuple(x.shape) for x in out] == [(6,), (6, 3), (6, 3), (6, 3)]
    out.reward.sum().backward()
    assert hidden.grad.is_meta
    assert hidden.grad.shape == hidden.shape


def test_a_layout_is_not_built_from_tensors_without_numbers():
    mask, lengths = torch.ones(2, 4, device="meta"), torch.ones(2, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="attention_mask: on meta, which has no numbers"):
        ak.SequenceLayout.padded(mask, mask)
    with pytest.raises(ValueError, match="prompt_lengths: on meta, which has no numbers"):
        ak.SequenceLayout.packed(lengths, lengths)


def test_a_batched_backward_is_a_clear_error(device):
    layout, _ = RAGGED.lay_out("packed", device)
    hidden = torch.randn(layout.num_tokens, 24, device=device, requires_grad=True)
    reward = random_head().to(device)(hidden, layout).reward
    with pytest.raises(RuntimeError, match="gated_expert_combination has no batched backward"):
        torch.autograd.grad(reward, hidden, torch.eye(6, device=device), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_head_gives_the_rewards_of_new_states(device):
    layout, _ = RAGGED.lay_out("packed", device)

    class Rewards(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, hidden):
            return self.head(hidden, layout).reward

    head = Rewards(random_head().to(device))
    one, other = torch.randn(2, layout.num_tokens, 24, device=device)
    assert torch.allclose(torch.jit.trace(head, one)(other), head(other), atol=1e-6)


def test_gradients_that_are_not_numbers_at_padding_reach_no_parameter(device):
    """A loss over a block's states that is undefined where there is no token, 0 * inf."""
    layout, source = RAGGED.lay_out("padded_right", device)
    refinement = random_head(num_blocks=2).refinement.to(device)
    hidden = place(torch.randn(RAGGED.num_tokens, 24, device=device), source).nan_to_num().requires_grad_()
    padding = (layout.roles == ak.TokenRole.PADDING)[:, None]
    for states in (refinement(hidden, layout)[0], [refinement.blocks[0](hidden, layout, update=hidden + 1)]):
        refinement.zero_grad()
        assert all((state[padding[:, 0]] == 0).all() for state in states)
        torch.autograd.backward(states, [torch.where(padding, torch.nan, 1.0).expand_as(x) for x in states])
        for name, parameter in refinement.blocks.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 8), r"hidden: shape \(2, 5, 8\) came, expected \[2, 5, 24\]"),
        ((2, 4, 24), r"this layout's \(B, L\) is \(2, 5\)"),
    ],
)
def test_three_dimensional_states_of_another_shape_are_named_as_they_came(shape, message):
    layout = ak.SequenceLayout.padded(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(ValueError, match=message):
        random_head()(torch.zeros(shape), layout)
