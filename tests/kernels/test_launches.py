"""How many kernels the head launches, counted without a GPU: Triton's launches are recorded, torch's are operations."""

from collections import Counter

import pytest
import torch

import adajudge_kernels as ak
from adajudge_kernels import backends
from benchmarks.eager import eager_head
from tests.kernels.conftest import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter runs kernels operation by operation", allow_module_level=True)

# What torch does without a kernel of its own: memory and views.
WITHOUT_KERNEL = {
    f"aten::{name}"
    for name in (  # noqa: SIM905
        "empty empty_like empty_strided as_strided view _unsafe_view reshape unbind detach alias resize_ lift_fresh t "
        "transpose select slice split tensor_split chunk unflatten squeeze unsqueeze expand expand_as _reshape_alias "
        "result_type item _local_scalar_dense is_nonzero set_ permute to resolve_conj resolve_neg narrow new_empty flatten mT"
    ).split()
}


def launches(call, monkeypatch):
    """Kernels by name that `call` launches on a GPU. Nothing runs; results are whatever memory holds."""
    from triton.runtime.jit import JITFunction

    found = Counter()

    def launcher(kernel, grid):
        return lambda *args, **kwargs: found.update([kernel.fn.__name__])

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", launcher)
        patch.setattr(backends, "_TRITON_INTERPRETED", True)  # let CPU tensors through
        with ak.use_backend("triton"), torch.profiler.profile() as profile:
            call()
    for event in profile.events():
        if event.cpu_parent is None:
            found.update(kernels_of(event))
    return found


def kernels_of(event):
    """The innermost torch operations below an event that have a kernel."""
    inner = Counter()
    for child in event.cpu_children:
        inner.update(kernels_of(child))
    has_own = event.name.startswith("aten::") and event.name not in WITHOUT_KERNEL
    return inner or Counter([event.name] if has_own else [])


LAYOUT = ak.SequenceLayout.shared_prompts([70, 5], [[60, 3], [9]])


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_heads_forward_launches_eight_kernels_and_eight_a_block(blocks, gradients, monkeypatch):
    head = ak.AdaJudgeHead(64, num_blocks=blocks, expert_hidden_size=16, router_hidden_size=16)
    hidden = torch.randn(LAYOUT.num_tokens, 64, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        found = launches(lambda: head(hidden, LAYOUT), monkeypatch)
    assert found.total() == 8 + 8 * blocks, dict(found)
    assert found["aten::mm"] == 4 * blocks


def test_the_loss_and_its_gradients_are_one_launch(monkeypatch):
    rewards = torch.randn(2, 8, requires_grad=True)
    weights = torch.rand(16, 3, requires_grad=True)
    chosen, rejected = rewards
    found = launches(lambda: ak.focal_bradley_terry_loss(chosen, rejected, view_weights=weights), monkeypatch)
    assert found.total() == 1, dict(found)


def backward_launches(blocks, monkeypatch):
    head = ak.AdaJudgeHead(64, num_blocks=blocks, expert_hidden_size=16, router_hidden_size=16)
    hidden = torch.randn(LAYOUT.num_tokens, 64, requires_grad=True)
    outputs = []
    launches(lambda: outputs.append(head(hidden, LAYOUT).reward.sum()), monkeypatch)
    return launches(outputs[0].backward, monkeypatch)


def test_the_heads_backward_launches_twenty_three_kernels_and_sixteen_a_block(monkeypatch):
    one, two = (backward_launches(blocks, monkeypatch) for blocks in (1, 2))
    assert one.total() <= 39, dict(one)
    assert (two - one).total() <= 16, dict(two - one)
    assert (two - one)["aten::mm"] == 8


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_plain_pytorch_launches_four_times_as_many_forward_and_three_times_backward(tokens, monkeypatch):
    head = ak.AdaJudgeHead(
        64, num_blocks=3, expert_hidden_size=16, router_hidden_size=16, attention_tokens=tokens
    )
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    attention = torch.ones(3, 12)
    attention[1, 9:] = 0
    response = torch.zeros(3, 12)
    response[:, 5:] = 1
    hidden = torch.randn(3, 12, 64)
    layout = ak.SequenceLayout.padded(attention, response)
    with ak.use_backend("reference"):
        expected = head(hidden, layout).reward
    assert torch.allclose(eager_head(head, hidden, attention, response), expected, atol=1e-5)
    outputs = []
    found = launches(lambda: outputs.append(eager_head(head, hidden, attention, response).sum()), monkeypatch)
    back = launches(outputs[0].backward, monkeypatch)
    assert found.total() >= 4 * (8 + 3 * 8), dict(found)
    assert back.total() >= 3 * (23 + 3 * 16), dict(back)
