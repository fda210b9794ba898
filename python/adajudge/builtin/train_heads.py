"""Heads on a frozen backbone: AdaJudge, its uniform-router control, and the fixed poolings it is compared with.

Every head sees the same cached states and the same pairs in the same order, and keeps the weights of its best
validation accuracy. They differ in their learning rate only.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Model

from adajudge.builtin.world import Row
from adajudge.data import ConversationEncoder, Message, pack_rows
from adajudge_kernels import (
    AdaJudgeHead,
    ExpertCombination,
    JudgeOutput,
    MultiViewPooling,
    PooledViews,
    SequenceLayout,
    focal_bradley_terry_loss,
    masked_mean_pool,
)

HEAD_HIDDEN = 128
_PACK = 8  # responses run through the backbone together: packed attention is quadratic in their tokens


@dataclass(frozen=True)
class Recipe:
    """Optimiser of a head."""

    learning_rate: float
    steps: int = 600
    pairs: int = 32
    weight_decay: float = 0.01
    evaluations: int = 10


@dataclass(frozen=True)
class CachedPair:
    """A pair's domain, and for each side the backbone's states ``[L, d]`` and prompt length."""

    domain: str
    states: tuple[Tensor, Tensor]
    prompt_length: int


@torch.inference_mode()
def cache_states(
    backbone: Qwen3Model, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]
) -> list[CachedPair]:
    """Run the frozen backbone over both sides of every pair, once, without padding."""
    encoder = ConversationEncoder(tokenizer)
    encoded = [
        encoder.encode((Message("user", row["prompt"]),), row[side])
        for row in rows
        for side in ("chosen", "rejected")
    ]
    states: list[Tensor] = []
    for begin in range(0, len(encoded), _PACK):
        pack = encoded[begin : begin + _PACK]
        batch = pack_rows(pack)
        positions = batch.layout.position_ids()[None]
        hidden = backbone(input_ids=batch.input_ids, position_ids=positions, use_cache=False)
        states += [part.clone() for part in hidden.last_hidden_state[0].split([len(row) for row in pack])]
    return [
        CachedPair(row["domain"], (states[2 * i], states[2 * i + 1]), encoded[2 * i].prompt_length)
        for i, row in enumerate(rows)
    ]


def lay_out(pairs: Sequence[CachedPair]) -> tuple[Tensor, SequenceLayout]:
    """States ``[T, d]`` of all chosen sides, then all rejected ones, and their packed layout."""
    states = [pair.states[side] for side in (0, 1) for pair in pairs]
    prompts = [pair.prompt_length for _ in (0, 1) for pair in pairs]
    lengths = [len(x) - n for x, n in zip(states, prompts, strict=True)]
    return torch.cat(states), SequenceLayout.packed(prompts, lengths)


class FixedPooling(nn.Module):
    """One view and one MLP of the width of AdaJudge's experts: last-token, mean or attention pooling."""

    def __init__(self, hidden_size: int, view: str) -> None:
        super().__init__()
        self.view = view
        self.pooling = MultiViewPooling(hidden_size)
        self.scorer = nn.Sequential(nn.Linear(hidden_size, HEAD_HIDDEN), nn.SiLU(), nn.Linear(HEAD_HIDDEN, 1))

    def forward(self, hidden: Tensor, layout: SequenceLayout) -> JudgeOutput:
        """Reward ``[B]``; the view's score stands for all three."""
        ones = hidden.new_ones(layout.num_sequences, 1)
        views = self.pooling([hidden], ones, layout)
        reward = self.scorer(getattr(views, self.view)).squeeze(1)
        return JudgeOutput(reward, reward[:, None].expand(-1, 3), ones.expand(-1, 3) / 3, ones)


class UnrefinedAdaJudge(nn.Module):
    """AdaJudge without refinement (K = 0), for the comparison only: views and experts on the backbone's states.

    With `uniform`, the control: the router's weights are replaced by a third each, and the reward is the mean
    of the view scores.
    """

    def __init__(self, hidden_size: int, uniform: bool = False) -> None:
        super().__init__()
        self.uniform = uniform
        self.pooling = MultiViewPooling(hidden_size)
        self.experts = ExpertCombination(hidden_size, HEAD_HIDDEN, HEAD_HIDDEN)

    def forward(self, hidden: Tensor, layout: SequenceLayout) -> JudgeOutput:
        """Reward ``[B]`` with view scores and weights ``[B, 3]``."""
        ones = hidden.new_ones(layout.num_sequences, 1)
        views: PooledViews = self.pooling([hidden], ones, layout)
        out = self.experts(views, masked_mean_pool(hidden, layout, "prompt"))
        if self.uniform:
            third = torch.full_like(out.view_weights, 1 / 3)
            return JudgeOutput(out.view_scores.mean(dim=1), out.view_scores, third, ones)
        return JudgeOutput(out.reward, out.view_scores, out.view_weights, ones)


def build_judge_head(hidden_size: int) -> AdaJudgeHead:
    """The head that ships: K = 2."""
    return AdaJudgeHead(
        hidden_size, num_blocks=2, expert_hidden_size=HEAD_HIDDEN, router_hidden_size=HEAD_HIDDEN
    )


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "last token": lambda d: FixedPooling(d, "last"),
    "mean": lambda d: FixedPooling(d, "mean"),
    "attention": lambda d: FixedPooling(d, "attention"),
    "AdaJudge K=0, uniform router": lambda d: UnrefinedAdaJudge(d, uniform=True),
    "AdaJudge K=0": UnrefinedAdaJudge,
}


def train_head(
    head: nn.Module, train: Sequence[CachedPair], validation: Sequence[CachedPair], seed: int, recipe: Recipe
) -> nn.Module:
    """Train `head` in place with the focal Bradley-Terry loss; the best validation step is kept."""
    decayed = [p for p in head.parameters() if p.dim() > 1]
    plain = [p for p in head.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        recipe.learning_rate,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _cosine(step, recipe.steps))
    best, best_state = -1.0, head.state_dict()
    every = max(1, recipe.steps // recipe.evaluations)
    for step, pairs in zip(range(1, recipe.steps + 1), _draw(train, seed, recipe.pairs), strict=False):
        out = head(*lay_out(pairs))
        chosen, rejected = out.reward.chunk(2)
        loss = focal_bradley_terry_loss(chosen, rejected, view_weights=out.view_weights)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        rate.step()
        if step % every == 0 or step == recipe.steps:
            accuracy = accuracies(head, validation)["average"]
            if accuracy > best:
                best, best_state = accuracy, copy.deepcopy(head.state_dict())
    head.load_state_dict(best_state)
    return head


def _cosine(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _draw(pairs: Sequence[CachedPair], seed: int, count: int) -> Iterator[list[CachedPair]]:
    """Batches without end: every pair once an epoch, in an order of the seed's."""
    rng, order = random.Random(f"pairs/{seed}"), list(pairs)
    while True:
        rng.shuffle(order)
        for begin in range(0, len(order) - count + 1, count):
            yield order[begin : begin + count]


@torch.inference_mode()
def accuracies(head: nn.Module, pairs: Sequence[CachedPair]) -> dict[str, float]:
    """Share of pairs with the chosen side strictly above, by domain, and the domains' plain average."""
    right: dict[str, list[bool]] = {}
    for begin in range(0, len(pairs), 128):
        batch = pairs[begin : begin + 128]
        chosen, rejected = head(*lay_out(batch)).reward.chunk(2)
        for pair, above in zip(batch, (chosen > rejected).tolist(), strict=True):
            right.setdefault(pair.domain, []).append(above)
    shares = {domain: sum(found) / len(found) for domain, found in right.items()}
    return shares | {"average": sum(shares.values()) / len(shares)}


@torch.inference_mode()
def view_weights(head: nn.Module, pairs: Sequence[CachedPair]) -> dict[str, list[float]]:
    """Mean weight of the last, mean and attention view by domain."""
    found: dict[str, list[Tensor]] = {}
    for begin in range(0, len(pairs), 128):
        batch = pairs[begin : begin + 128]
        pi = head(*lay_out(batch)).view_weights
        for i, pair in enumerate([*batch, *batch]):
            found.setdefault(pair.domain, []).append(pi[i])
    return {domain: torch.stack(rows).mean(dim=0).tolist() for domain, rows in found.items()}
