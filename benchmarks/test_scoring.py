"""A whole judge: scoring six responses to each prompt, and a training step on pairs, with backbones of known sizes.

The loops that people write read padded batches with torch's attention and the head in plain PyTorch: in the order in which
rows arrive, as TRL and RewardBench do, or sorted by length. Ours computes each prompt once. "backbone alone"
is the floor: what ours would take if its head cost nothing.
"""

import copy
import functools
import itertools

import pytest
import torch
from adajudge.data import EncodedRow, pack_rows, pack_shared_prompts
from adajudge.scoring import Engine
from adajudge.scoring.packing import packed_packs, shared_packs

import adajudge_kernels as ak
from benchmarks import lengths
from benchmarks.backbones import CONFIGURATIONS, judge
from benchmarks.batches import Batch
from benchmarks.case import FLOOR, OURS, Case, Side
from benchmarks.eager import eager_head


def eager_rewards(model, ids, response):
    """Rewards ``[B]`` of a right-padded batch; ids -1 at padding."""
    real = ids >= 0
    states = model.backbone(input_ids=ids.clamp(min=0), attention_mask=real.long(), use_cache=False)
    return eager_head(model.head, states.last_hidden_state, real, response)


def padded_loop(model, batch, ids, order, size):
    """Rewards by batches of so many sequences, taken in an order; each padded to its longest."""
    padded = torch.where(batch.attention, ids[batch.index.clamp(min=0)], -1)
    lengths_of = batch.attention.sum(dim=1)
    rewards = torch.empty(len(order), device=ids.device)
    for rows in order.split(size):
        longest = int(lengths_of[rows].max())
        rewards[rows] = eager_rewards(model, padded[rows, :longest], batch.response[rows, :longest]).float()
    return rewards


def encoded(prompts, responses, ids):
    """The sequences of flat ids, in which each prompt comes once, before its responses."""
    flat, rows = iter(ids.tolist()), []
    for prompt, group in zip(prompts, responses, strict=True):
        own = list(itertools.islice(flat, prompt))
        rows += [EncodedRow(own + list(itertools.islice(flat, length)), prompt) for length in group]
    return rows


def packed_rewards(model, rows, budget):
    """Each sequence with its own prompt, packed."""
    rewards = torch.empty(len(rows))
    device = next(model.parameters()).device
    for pack in packed_packs(rows, range(len(rows)), budget):
        batch = pack_rows([rows[index] for index in pack.sequences]).to(device)
        rewards[pack.sequences] = model(batch.input_ids, layout=batch.layout).logits[:, 0].float().cpu()
    return rewards


def backbone_passes(model, rows, budget):
    """What the engine asks of the backbone for these sequences, ready to be called."""
    device = next(model.parameters()).device
    passes = []
    for pack in shared_packs(rows, range(len(rows)), budget):
        batch = pack_shared_prompts([[rows[index] for index in group] for group in pack.groups]).to(device)
        passes.append(
            functools.partial(
                model.backbone,
                input_ids=batch.input_ids,
                position_ids=batch.layout.position_ids()[None],
                use_cache=False,
                adajudge_layout=batch.layout,
            )
        )
    return passes


def multiply_adds(model, rows):
    """Of a backbone and of a head that read each prompt once: matrix products, and attention's scores and mixtures."""
    prompts = {tuple(row.prompt_ids): row.prompt_length for row in rows}.values()
    tokens = sum(prompts) + sum(row.response_length for row in rows)
    seen = sum(n * (n + 1) // 2 for n in prompts)
    seen += sum(
        row.response_length * row.prompt_length + row.response_length * (row.response_length + 1) // 2
        for row in rows
    )
    config = model.backbone.config
    layers = sum(p.numel() for p in model.backbone.layers.parameters())
    blocks = sum(p.numel() for p in model.head.refinement.blocks.parameters())
    experts = sum(p.numel() for p in model.head.experts.parameters())
    backbone = (
        tokens * layers + 2 * seen * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    )
    head = (
        tokens * blocks
        + 2 * seen * len(model.head.refinement.blocks) * config.hidden_size
        + len(rows) * experts
    )
    return backbone, head


def scoring_case(name, prompts, size, depths, dtype, device, places):
    lengths_of = lengths.candidates(prompts)
    batch = Batch.shared(*lengths_of, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(CONFIGURATIONS[name].vocab_size, (batch.rows,), generator=generator).to(device)
    model, other = judge(name, "adajudge", depths, dtype, device), judge(name, "sdpa", depths, dtype, device)
    counts = batch.attention.sum(dim=1)
    arrival = torch.arange(len(counts), device=device)
    rows = encoded(*lengths_of, ids)
    engine = Engine(model)
    passes = backbone_passes(model, rows, engine.token_budget)
    of_backbone, of_head = multiply_adds(model, rows)

    def backbone_alone():
        for read in passes:
            read()
        return []

    def exact(backward):
        wide = copy.deepcopy(other).to(torch.float64 if device.type == "cpu" else torch.float32)
        with torch.no_grad():
            return [padded_loop(wide, batch, ids, counts.argsort(), size)], []

    return Case(
        group="scoring",
        shape=f"{name}, K={depths}, {len(rows)} responses to {prompts} prompts, {batch.rows} tokens, batches of {size}",
        dtype=dtype,
        device=device,
        sides={
            OURS: Side(lambda: [torch.tensor([score.reward for score in engine.score(rows)])], [[]]),
            "prompts not shared": Side(lambda: [packed_rewards(model, rows, engine.token_budget)], [[]]),
            "padded, arrival order": Side(lambda: [padded_loop(other, batch, ids, arrival, size)], [[]]),
            "padded, sorted by length": Side(
                lambda: [padded_loop(other, batch, ids, counts.argsort(), size)], [[]]
            ),
            FLOOR: Side(backbone_alone, [[]]),
        },
        exact=exact,
        tokens=batch.useful_tokens,
        forward_bytes=sum(p.nbytes for p in model.parameters()),
        backward_bytes=0,
        multiply_adds=of_backbone + of_head,
        floors=frozenset({FLOOR}),
        deep=True,
        notes={"head_share_of_arithmetic": of_head / (of_backbone + of_head)},
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
        return ak.focal_bradley_terry_loss(chosen, rejected)

    def exact(backward):
        """Pair by pair: a wider dtype's states of all of them would not fit."""
        wide = copy.deepcopy(other).to(torch.float64 if device.type == "cpu" else torch.float32)
        parameters, mean = list(wide.parameters()), 0.0
        for ids_of_pair, response in zip(padded.split(2), batch.response.split(2), strict=True):
            share = loss(eager_rewards(wide, ids_of_pair, response)) / pairs
            share.backward()
            mean += share.detach()
        return [mean], [2 * mean * p.grad for p in parameters]  # of the square, as `Side.outputs` says

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
                lambda *_: [loss(model(ids, layout=batch.layout).logits[:, 0])], [list(model.parameters())]
            ),
            "padded": Side(
                lambda *_: [loss(eager_rewards(other, padded, batch.response).float())],
                [list(other.parameters())],
            ),
        },
        exact=exact,
        tokens=batch.useful_tokens,
        forward_bytes=weights,
        backward_bytes=3 * weights,
        multiply_adds=batch.rows * parameters,
        deep=True,
    )


@pytest.mark.parametrize(
    "side", [OURS, "prompts not shared", "padded, arrival order", "padded, sorted by length", FLOOR]
)
def test_scoring(measured, backbones, side, chosen, device):
    build = functools.partial(
        scoring_case, backbones, chosen.prompts, chosen.padded_rows, chosen.depths, chosen.dtypes[0], device
    )
    measured(build, side, False, family="refinement")


@pytest.mark.parametrize("side", [OURS, "padded"])
def test_training_step(measured, trained, side, chosen, device):
    build = functools.partial(
        training_case, *trained, chosen.length_scale, chosen.depths, chosen.dtypes[0], device
    )
    measured(build, side, True, family="refinement")


def candidates_case(prompt, response, count, trained, device, places):
    """One prompt and its candidates: read once together, or as people score them, one by one or in a padded batch."""
    lengths_of = [prompt], [[response] * count]
    batch = Batch.shared(*lengths_of, device)
    ids = torch.randint(1024, (batch.rows,), generator=torch.Generator().manual_seed(0)).to(device)
    model, other = (judge("tiny", attention, 2, torch.float32, device) for attention in ("adajudge", "sdpa"))
    repeated = ids[batch.index]
    rows = encoded(*lengths_of, ids)
    engine = Engine(model)

    def one_by_one(of):
        each = zip(repeated.split(1), batch.response.split(1), strict=True)
        return [torch.cat([eager_rewards(of, row, response) for row, response in each])]

    def ours():
        if trained:
            return [model(ids, layout=batch.layout).logits[:, 0]]
        return [torch.tensor([score.reward for score in engine.score(rows)])]

    def exact(backward):
        wide = copy.deepcopy(other).double()
        return Side(lambda *_: one_by_one(wide), [list(wide.parameters())]).outputs(0, backward)

    weights = sum(p.nbytes for p in model.parameters())
    parameters = [list(other.parameters())]
    return Case(
        group="candidates of one prompt",
        shape=f"prompt {prompt}, {count} responses of {response}, d=256, 8 layers",
        dtype=torch.float32,
        device=device,
        sides={
            OURS: Side(lambda *_: ours(), [list(model.parameters())]),
            "one by one": Side(lambda *_: one_by_one(other), parameters),
            "padded batch": Side(lambda *_: [eager_rewards(other, repeated, batch.response)], parameters),
        },
        exact=exact,
        tokens=batch.useful_tokens,
        forward_bytes=weights,
        backward_bytes=3 * weights,
    )


@pytest.mark.parametrize(
    ("backward", "side"),
    [*itertools.product([False, True], [OURS, "one by one", "padded batch"])],
)
def test_shared_prompts(measured, backward, side, device):
    build = functools.partial(candidates_case, 512, 64, 8, backward, device)
    measured(build, side, backward, family="refinement")
