"""A judge whose every operation, its backbone's attention too, runs on Triton: it learns as it does on the reference."""

import os

import pytest
import torch
from transformers import Qwen3Config

import adajudge_kernels as ak
from tests.adajudge.judges import random_judge
from tests.kernels.batches import Batch

pytestmark = pytest.mark.skipif(
    "triton" not in ak.available_backends(), reason="needs a GPU, or TRITON_INTERPRET=1"
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", id="triton-cpu")
    if INTERPRETED
    else pytest.param("cuda", id="triton-cuda", marks=pytest.mark.gpu)
]
PAIR = Batch((6,), ((4, 4),))
STEPS = 50


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def tiny_judge(device):
    backbone = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    return random_judge(attn_implementation="adajudge", backbone=backbone).to(device)


def pair_of_ids(generator):
    """A prompt, a response that speaks of the first half of the words, and one of the second half."""
    prompt, rejected = (torch.randint(32, 64, (n,), generator=generator) for n in (6, 4))
    return torch.cat([prompt, torch.randint(0, 32, (4,), generator=generator), rejected])


def loss_of(out, entropy_floor=1.0):
    """The router starts away from uniform, below the floor, so that the entropy matters."""
    chosen, rejected = out.logits[:, 0].unflatten(0, (-1, 2)).unbind(1)
    return ak.focal_bradley_terry_loss(
        chosen, rejected, view_weights=out.view_weights, entropy_floor=entropy_floor
    )


def losses_of_training(backend, device):
    layout, _ = PAIR.lay_out("shared", device)
    generator = torch.Generator().manual_seed(0)
    pairs = [pair_of_ids(generator).to(device) for _ in range(4)]
    model, losses = tiny_judge(device).train(), []
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    with ak.use_backend(backend):
        for step in range(STEPS):
            loss = loss_of(model(input_ids=pairs[step % 4][None], layout=layout))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return losses


def test_it_learns_as_on_the_reference(device):
    losses, expected = (losses_of_training(backend, device) for backend in ("triton", "reference"))
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    assert losses[:3] == pytest.approx(expected[:3], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_rewards_and_every_gradient_are_those_of_the_reference(device):
    batch = Batch((5, 0, 9), ((4, 1), (6,), (8, 3, 2)))
    layout, _ = batch.lay_out("shared", device)
    ids = torch.randint(0, 64, (batch.num_tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for backend in ("reference", "triton"):
        model = tiny_judge(device)
        with ak.use_backend(backend):
            out = model(input_ids=ids[None], layout=layout)
            loss_of(out).backward()
        results.append({name: p.grad for name, p in model.named_parameters()} | {"rewards": out.logits})
    expected, got = results
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        # The attention view's bias and the embeddings of unused words move nothing: their gradients are noise or zero.
        assert (got[name] - x).abs().max() <= 1e-4 * x.abs().max() + 1e-7, name
