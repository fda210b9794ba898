"""What a reward is made of, exactly; and what it would be without each part of the response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from adajudge.attention_masks import masked_attention
from adajudge.data import EncodedRow, Row, RowError
from adajudge.modeling import AdaJudgeForSequenceClassification
from adajudge.scoring import Score, Scorer, ScoringError
from adajudge.scoring.reading import attention_of
from adajudge_kernels import SequenceLayout

from .token_texts import token_texts

_MOST_PARTS = 40
_END_OF_PART = re.compile(r"[.!?]+[\"'”’)\]]*\s+|[。！？]+[”’」』）]*\s*|\n+")
# What stands before the dot of "1. " and "e.g. ".
_NO_END = re.compile(r"(^|\n)\s*\d+$|\b(e\.g|i\.e|cf|vs|Dr|Mr|Ms|Mrs)$")


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the sequence.

    Args:
        text: what the sequence's text gains by it; empty where the next token completes a character.
        is_response: else it is the prompt's.
        attention: beta, its weight in the attention view; they sum to 1 over the sequence.
        evidence: its weight in what the router lets through, ``pi_L [t = last] + pi_M m_t / n + pi_A beta_t``, n the response
            tokens; they sum to 1 over the sequence.
    """

    text: str
    is_response: bool
    attention: float
    evidence: float


@dataclass(frozen=True, slots=True)
class Part:
    """A sentence or line of the response.

    Args:
        text: with the white space behind it; the parts joined are the response.
        effect: the reward less that of the response without this part. None: it is the whole response, what is left cannot be
            scored, or the sequence was cut, so that other text would take the part's room.
    """

    text: str
    effect: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one response.

    Args:
        name: ``response``, ``chosen``, ``rejected`` or ``responses[i]``.
        score: its reward ``sum_v pi_v s_v``, and the view scores s, the router's pi and the depth weights.
        tokens: of prompt and response.
        parts: of the response, at most 40.
    """

    name: str
    score: Score
    tokens: tuple[Token, ...]
    parts: tuple[Part, ...]

    def to_record(self) -> dict[str, Any]:
        """In JSON's types."""
        return asdict(self)


def explain(scorer: Scorer, row: Row) -> list[Explanation] | RowError:
    """One explanation for each response of a row, or why there is none.

    The responses and all that is left of them without each part are scored together: their prompt is read once.
    """
    encoded = scorer.encode(row)
    if isinstance(encoded, RowError):
        return encoded
    parts = [split(response) for response in row.responses]
    left = [
        [None if whole.truncated else _encode(scorer, row, rest) for rest in _without_each(texts)]
        for texts, whole in zip(parts, encoded, strict=True)
    ]
    sequences = [*encoded, *(item for items in left for item in items if item is not None)]
    scores = scorer.score_encoded(sequences)
    for score in scores[: len(encoded)]:
        if isinstance(score, ScoringError):
            return row.error("row", str(score))
    rests = iter(scores[len(encoded) :])
    explanations = []
    for index, (sequence, score) in enumerate(zip(encoded, scores, strict=False)):
        assert isinstance(score, Score)
        effects = [None if item is None else _effect(score, next(rests)) for item in left[index]]
        explanations.append(
            Explanation(
                row.name_of(index),
                score,
                _tokens(scorer, sequence, score),
                tuple(map(Part, parts[index], effects)),
            )
        )
    return explanations


def split(response: str) -> list[str]:
    """Sentences and lines; neighbours together where there are more than 40."""
    found = _END_OF_PART.finditer(response)
    ends = [x.end() for x in found if not (x[0][0] == "." and _NO_END.search(response[: x.start()][-40:]))]
    cuts = sorted({0, *ends, len(response)})
    parts = [response[start:end] for start, end in pairwise(cuts)]
    size = -(-len(parts) // _MOST_PARTS)
    return ["".join(parts[i : i + size]) for i in range(0, len(parts), size)]


def _without_each(parts: Sequence[str]) -> list[str]:
    return ["".join((*parts[:i], *parts[i + 1 :])) for i in range(len(parts))]


def _encode(scorer: Scorer, row: Row, response: str) -> EncodedRow | None:
    """Where a row with this response would be scored."""
    if not response.strip():
        return None
    encoded = scorer.encode(replace(row, kind="single", responses=(response,)))
    return None if isinstance(encoded, RowError) else encoded[0]


def _effect(whole: Score, rest: Score | ScoringError) -> float | None:
    return None if isinstance(rest, ScoringError) else whole.reward - rest.reward


def _tokens(scorer: Scorer, sequence: EncodedRow, score: Score) -> tuple[Token, ...]:
    """Each token with its weights."""
    attention = attention_weights(scorer.model, sequence)
    last, mean, attended = score.view_weights
    evidence = attended * attention
    evidence[sequence.prompt_length :] += mean / sequence.response_length
    evidence[-1] += last
    texts = token_texts(scorer.encoder.tokenizer, sequence.input_ids)
    columns = zip(texts, sequence.response_mask, attention.tolist(), evidence.tolist(), strict=True)
    return tuple(Token(text, bool(is_response), beta, weight) for text, is_response, beta, weight in columns)


@torch.inference_mode()
def attention_weights(model: AdaJudgeForSequenceClassification, sequence: EncodedRow) -> Tensor:
    """beta ``[T]`` of the attention view in fp64 on the CPU, by plain PyTorch: ``softmax_t(w_a . H~_t + b_a)``."""
    caught: list[Any] = []
    hook = model.head.pooling.register_forward_pre_hook(lambda _, inputs: caught.append(inputs))
    device = next(model.parameters()).device
    tokens = torch.tensor([sequence.input_ids], device=device)
    mask = torch.tensor([sequence.response_mask], device=device)
    try:
        with attention_of(model, masked_attention(model.backbone)):
            model(tokens, attention_mask=torch.ones_like(tokens), response_mask=mask)
    finally:
        hook.remove()
    ((states, depth_weights, layout),) = caught
    assert isinstance(layout, SequenceLayout)
    mixed = sum(
        alpha * state.double() for alpha, state in zip(depth_weights[0].double(), states, strict=True)
    )
    pooling = model.head.pooling
    logits = (mixed @ pooling.attention_weight.double() + pooling.attention_bias.double()).cpu()
    if pooling.attention_tokens == "response":
        logits[: sequence.prompt_length] = -torch.inf
    return logits.softmax(dim=0)
