"""A whole judge: scoring six responses to each prompt, and a training step on pairs, with backbones of known sizes.

The loops that people write read padded batches with torch's attention and the head in plain PyTorch: in the order in which
rows arrive, eight at a time, as TRL and RewardBench do, or sorted by length. Ours computes each prompt once. "backbone alone"
is the floor: what ours would take if its head cost nothing.
"""

import copy
import functools

import pytest
import torch

import adajudge_kernels as ak
from benchmarks import lengths
from benchmarks.backbones import CONFIGURATIONS, judge
from benchmarks.batches import Batch
from benchmarks.case import OURS, Case, Side
from benchmarks.eager import eager_head

ROWS = 8  # of a padded batch
TOKENS = 16384  # of a pack
FLOOR = "backbone alone"


def eager_rewards(model, ids, response):
    """Rewards ``[B]`` of a right-padded batch; ids -1 at padding."""
    real = ids >= 0
    states = model.backbone(input_ids=ids.clamp(min=0), attention_mask=real.long(), use_cache=False)
    return eager_head(model.head, states.last_hidden_state, real, response)


def padded_loop(model, batch, ids, order):
    """Rewards by batches of `ROWS` sequences, taken in an order; each padded to its longest."""
    padded = torch.where(batch.attention, ids[batch.index.clamp(min=0)], -1)
    lengths_of = batch.attention.sum(dim=1)
    rewards = torch.empty(len(order), device=ids.device)
    for rows in order.split(ROWS):
        longest = int(lengths_of[rows].max())
        rewards[rows] = eager_rewards(model, padded[rows, :longest], batch.response[rows, :longest]).float()
    return rewards


def packs(prompts, responses):
    """Ranges of prompts which have about `TOKENS` tokens with their responses."""
    start, filled = 0, 0
    for index, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        tokens = prompt + sum(group)
        if filled and filled + tokens > TOKENS:
            yield slice(start, index)
            start, filled = index, 0
        filled += tokens
    yield slice(start, len(prompts))


def pieces(ids, prompts, responses, device):
    """Flat ids with their layout, pack by pack: each prompt once, then its responses."""
    start = 0
    for pack in packs(prompts, responses):
        layout = ak.SequenceLayout.shared_prompts(prompts[pack], responses[pack], device)
        yield ids[start : start + layout.num_tokens], layout
        start += layout.num_tokens


def repeated_pieces(ids, prompts, responses, device):
    """The same with the prompt before each response."""
    for tokens, shared in pieces(ids, prompts, responses, device):
        ranges = shared.ranges.tolist()
        flat = torch.cat([torch.cat([tokens[a:b], tokens[c:d]]) for a, b, c, d in ranges])
        yield (
            flat,
            ak.SequenceLayout.packed(
                [b - a for a, b, _, _ in ranges], [d - c for _, _, c, d in ranges], device
            ),
        )


def scoring_case(name, prompts, scale, depths, dtype, device, places):
    lengths_of = lengths.candidates(prompts, scale)
    batch = Batch.shared(*lengths_of, device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = CONFIGURATIONS[name].vocab_size
    ids = torch.randint(vocabulary, (batch.rows,), generator=generator).to(device)
    model, other = judge(name, "adajudge", depths, dtype, device), judge(name, "sdpa", depths, dtype, device)
    counts = batch.attention.sum(dim=1)
    arrival = torch.arange(len(counts), device=device)
    shared = list(pieces(ids, *lengths_of, device))
    repeated = list(repeated_pieces(ids, *lengths_of, device))

    def scored(parts):
        return [torch.cat([model(tokens, layout=layout).logits[:, 0].float() for tokens, layout in parts])]

    def exact(backward):
        wide = copy.deepcopy(other).to(torch.float64 if device.type == "cpu" else torch.float32)
        with torch.no_grad():
            return [padded_loop(wide, batch, ids, counts.argsort())], []

    def backbone_alone():
        for tokens, layout in shared:
            positions = layout.position_ids()[None]
            model.backbone(
                input_ids=tokens[None], position_ids=positions, use_cache=False, adajudge_layout=layout
            )
        return []

    config = CONFIGURATIONS[name]
    parameters = sum(p.numel() for p in model.backbone.parameters()) - config.vocab_size * config.hidden_size
    return Case(
        group="scoring",
        shape=f"{name}, K={depths}, {prompts} prompts of {batch.rows} tokens with six responses each",
        dtype=dtype,
        device=device,
        sides={
            OURS: Side(lambda: scored(shared), [[]]),
            "packed": Side(lambda: scored(repeated), [[]]),
            "padded, arrival order": Side(lambda: [padded_loop(other, batch, ids, arrival)], [[]]),
            "padded, sorted by length": Side(
                lambda: [padded_loop(other, batch, ids, counts.argsort())], [[]]
            ),
            FLOOR: Side(backbone_alone, [[]]),
        },
        exact=exact,
        tokens=batch.useful_tokens,
        forward_bytes=sum(p.nbytes for p in model.parameters()),
        backward_bytes=0,
        multiply_adds=batch.rows * parameters,
        floors=frozenset({FLOOR}),
    )


def training_case(name, pairs, scale, depths, dtype, device, places):
    """Loss of pairs and the gradients of all weights; ours computes each pair's prompt once."""
    prompts, responses = lengths.candidates(pairs, scale)
    responses = [[group[1], group[4]] for group in responses]  # of medium length, one chosen and one rejected
    batch = Batch.shared(prompts, responses, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(CONFIGURATIONS[name].vocab_size, (batch.rows,), generator=generator).to(device)
    padded = torch.where(batch.attention, ids[batch.index.clamp(min=0)], -1)
    model, other = judge(name, "adajudge", depths, dtype, device), judge(name, "sdpa", depths, dtype, device)

    def loss(rewards):
        chosen, rejected = rewards.unflatten(0, (-1, 2)).unbind(1)
        return [ak.focal_bradley_terry_loss(chosen, rejected)]

    def exact(backward):
        wide = copy.deepcopy(other).to(torch.float64 if device.type == "cpu" else torch.float32)
        return Side(
            lambda *_: loss(eager_rewards(wide, padded, batch.response)), [list(wide.parameters())]
        ).outputs(0, backward)

    config = CONFIGURATIONS[name]
    parameters = sum(p.numel() for p in model.backbone.parameters()) - config.vocab_size * config.hidden_size
    weights = sum(p.nbytes for p in model.parameters())
    return Case(
        group="training step",
        shape=f"{name}, K={depths}, {pairs} pairs",
        dtype=dtype,
        device=device,
        sides={
            OURS: Side(
                lambda *_: loss(model(ids, layout=batch.layout).logits[:, 0]), [list(model.parameters())]
            ),
            "padded": Side(
                lambda *_: loss(eager_rewards(other, padded, batch.response).float()),
                [list(other.parameters())],
            ),
        },
        exact=exact,
        tokens=batch.useful_tokens,
        forward_bytes=weights,
        backward_bytes=3 * weights,
        multiply_adds=batch.rows * parameters,
    )


@pytest.mark.parametrize("side", [OURS, "packed", "padded, arrival order", "padded, sorted by length", FLOOR])
def test_scoring(measured, backbones, side, chosen, device):
    build = functools.partial(
        scoring_case, backbones, chosen.prompts, chosen.length_scale, chosen.depths, chosen.dtypes[0], device
    )
    measured(build, side, False, family="refinement")


@pytest.mark.parametrize("side", [OURS, "padded"])
def test_training_step(measured, trained, side, chosen, device):
    build = functools.partial(
        training_case, trained, chosen.prompts, chosen.length_scale, chosen.depths, chosen.dtypes[0], device
    )
    measured(build, side, True, family="refinement")


def candidates_case(prompt, response, count, device, places):
    """One prompt and its candidates: together, or one call for each on torch's attention, as people score them."""
    lengths_of = [prompt], [[response] * count]
    batch = Batch.shared(*lengths_of, device)
    ids = torch.randint(1024, (batch.rows,), generator=torch.Generator().manual_seed(0)).to(device)
    model, other = (judge("tiny", attention, 2, torch.float32, device) for attention in ("adajudge", "sdpa"))
    single = ak.SequenceLayout.packed([prompt], [response], device)
    rows = [ids[index] for index in batch.index]

    def one_by_one(of):
        return [torch.cat([of(row, layout=single).logits[:, 0] for row in rows])]

    def exact(backward):
        wide = copy.deepcopy(other).double()
        return Side(lambda *_: one_by_one(wide), [list(wide.parameters())]).outputs(0, backward)

    weights = sum(p.nbytes for p in model.parameters())
    return Case(
        group="candidates of one prompt",
        shape=f"prompt {prompt}, {count} responses of {response}, d=256, 8 layers",
        dtype=torch.float32,
        device=device,
        sides={
            OURS: Side(lambda *_: [model(ids, layout=batch.layout).logits[:, 0]], [list(model.parameters())]),
            "one by one": Side(lambda *_: one_by_one(other), [list(other.parameters())]),
        },
        exact=exact,
        tokens=batch.useful_tokens,
        forward_bytes=weights,
        backward_bytes=3 * weights,
    )


@pytest.mark.parametrize("side", [OURS, "one by one"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
def test_shared_prompts(measured, backward, side, device):
    measured(functools.partial(candidates_case, 512, 64, 8, device), side, backward, family="refinement")
