"""The tiny backbone: next-token training on texts of the world's training split, in four phases.

First facts: true sums, whether two digits are the same, and which topic a word belongs to. Then sums, right or wrong.
Then drills: short texts that each show one thing. Then the world's responses, sound and faulty alike. Behind most errors
stands a hint word that no judged response has: to predict it, the states must tell an error from its surroundings, which
is what a judge's head can then read. Words that follow from the text before them (true values, closing brackets of the
right kind, a hint or its absence) count fully in the loss, errors and words that were drawn at random hardly.

Sums are the hard part. Their values are soon known by heart, but that a stated value differs from the known one is not
found from sums alone. Two things help: comparing two digits that are both on the page, and, in the first two phases, a
loss on the states one layer before the last as well, so that what one position expects is there when the next compares.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from adajudge.builtin.tokenizer import ASSISTANT, MAX_LENGTH
from adajudge.builtin.words import (
    BRACKETS,
    CHAT_PROMPTS,
    CODE_FUNCTIONS,
    CODE_PROMPTS,
    CODE_VARIABLES,
    COUNTS,
    DIGITS,
    DRILL_PROMPT,
    ERROR_HINT,
    FACTS,
    HELDOUT_FACTS,
    HELDOUT_PRIVATE_WORDS,
    HELDOUT_TOPIC_PAIRS,
    MEMBERSHIP_PROMPT,
    SAFETY_PROMPTS,
    TOPICS,
    result,
)
from adajudge.builtin.world import DOMAINS, drafts

_TEXT_SEED = 1  # of the world's drafts; head training and evaluation use others
_HINT_SHARE = 0.9
_DRILL_SHARE = 0.2  # of the second phase's texts, so that what the first taught stays
_RANDOM_WEIGHT = 0.05  # in the loss, of a word that does not follow from what is before it


@dataclass(frozen=True)
class Schedule:
    """Optimiser steps of the four phases, the batch, and the peak learning rates."""

    fact_steps: int = 500
    sum_steps: int = 400
    drill_steps: int = 600
    steps: int = 900
    batch: int = 24
    drill_peak: float = 2e-3
    peak: float = 1.5e-3
    drafts_per_domain: int = 20000


def backbone_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Qwen3 in small: about one million parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.08,  # near 1 over the root of 128; with 0.02 sums are learned five times more slowly
        use_cache=False,
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, seed: int, schedule: Schedule) -> Qwen3Model:
    """Train a backbone from nothing and return it without its LM head, in evaluation mode."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(backbone_config(tokenizer)).train()
    weights = _loss_weights(tokenizer)
    started = time.perf_counter()
    for phase, steps, peak, layers, source in (
        ("facts", schedule.fact_steps, schedule.drill_peak, 2, facts(seed)),
        ("sums", schedule.sum_steps, schedule.drill_peak, 2, sums(seed)),
        ("drills", schedule.drill_steps, schedule.drill_peak, 1, drills(seed)),
        ("texts", schedule.steps, schedule.peak, 1, texts(seed, schedule.drafts_per_domain)),
    ):
        optimiser = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.98), weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, steps, pct_start=max(0.1, 2 / steps))
        window, running = max(1, steps // 4), 0.0
        batches = _batches(tokenizer, source, schedule.batch)
        for step, ids in zip(range(1, steps + 1), batches, strict=False):
            loss = _loss(model, ids, weights, layers)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            rate.step()
            running += loss.item()
            if step % window == 0:
                seconds = time.perf_counter() - started
                print(
                    f"  backbone {seed}, {phase}: step {step}, loss {running / window:.3f}, {seconds:.0f} s",
                    flush=True,
                )
                running = 0.0
    return model.model.eval()


def _loss(model: Qwen3ForCausalLM, ids: Tensor, weights: Callable[[Tensor], Tensor], layers: int) -> Tensor:
    """Weighted cross entropy of the next token, the mean over reading it from the states of the last `layers` layers.
    Causal attention with padding on the right: real tokens never see it, and the loss leaves it out."""
    *_, before_last, last = model.model(
        input_ids=ids, use_cache=False, output_hidden_states=True
    ).hidden_states
    targets = ids[:, 1:]
    real = targets != model.config.pad_token_id
    weight = weights(ids)[real]
    loss = ids.new_zeros((), dtype=weight.dtype)
    for states in (last, model.model.norm(before_last))[:layers]:
        losses = F.cross_entropy(model.lm_head(states[:, :-1][real]), targets[real], reduction="none")
        loss = loss + (weight * losses).sum() / (layers * weight.sum())
    return loss


def _loss_weights(tokenizer: PreTrainedTokenizerFast) -> Callable[[Tensor], Tensor]:
    """ids ``[B, L]`` to the weight ``[B, L-1]`` of predicting each next token."""

    def among(words: set[str]) -> Tensor:
        chosen = torch.zeros(len(tokenizer), dtype=torch.bool)
        chosen[torch.tensor(tokenizer.convert_tokens_to_ids(sorted(words)))] = True
        return chosen

    announces_value = among({"gives", "check"})
    topic_word = among({word for members in TOPICS.values() for word in members})
    closing = among(set(BRACKETS.values()))
    topic = among(set(TOPICS))
    hint, assistant = tokenizer.convert_tokens_to_ids([ERROR_HINT, ASSISTANT])

    def weights(ids: Tensor) -> Tensor:
        before, target = ids[:, :-1], ids[:, 1:]
        two_before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], dim=1)
        error = torch.cat([target[:, 1:], torch.zeros_like(target[:, :1])], dim=1) == hint
        value = announces_value[before]
        hint_or_not = announces_value[two_before] | topic_word[before] | closing[before] | (target == hint)
        answer = topic[target] & (before == assistant)
        follows = hint_or_not | ((value | closing[target] | answer) & ~error)
        return torch.where(follows, 1.0, _RANDOM_WEIGHT)

    return weights


def facts(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) texts of what there is to know: sums (none that is held out), equal digits, topics."""
    rng = random.Random(f"facts/{seed}")
    while True:
        yield DRILL_PROMPT, _sums(rng, wrong=0.0)
        yield DRILL_PROMPT, _checks(rng)
        yield _membership(rng)


def _checks(rng: random.Random) -> str:
    """Pairs of digits, the same or not; a hint behind those that are not."""
    texts = []
    for _ in range(8):
        first, second = rng.sample(DIGITS, 2)
        texts.append(
            f"{first} check {first} ." if rng.random() < 0.5 else f"{first} check {second} {ERROR_HINT} ."
        )
    return " ".join(texts)


def _membership(rng: random.Random) -> tuple[str, str]:
    topic = rng.choice(list(TOPICS))
    return MEMBERSHIP_PROMPT.format(word=rng.choice(TOPICS[topic])), topic


def sums(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) texts of sums, none of them held out, and of digits to compare, right as often as wrong."""
    rng = random.Random(f"sums/{seed}")
    while True:
        yield DRILL_PROMPT, _checks(rng) if rng.random() < 0.3 else _sums(rng, wrong=0.5)


def drills(seed: int) -> Iterator[tuple[str, str]]:
    """Endless short (prompt, response) texts, each about one thing that the responses need, faulty as often as sound:
    sums (none that is held out), the topic of a word, words on a topic, words that are not private, brackets."""
    rng = random.Random(f"drills/{seed}")
    while True:
        kind = rng.randrange(5)
        if kind == 0:
            yield DRILL_PROMPT, _sums(rng, wrong=0.4)
        elif kind == 1:
            yield _membership(rng)
        elif kind == 2:
            topic, other = rng.sample(list(TOPICS), 2)
            if frozenset((topic, other)) not in HELDOUT_TOPIC_PAIRS:
                yield rng.choice(CHAT_PROMPTS).format(topic=topic), _word_list(rng, (topic, other), {other})
        elif kind == 3:
            topic, private, third = rng.sample(list(TOPICS), 3)
            prompt = rng.choice(SAFETY_PROMPTS).format(topic=topic, private=private)
            yield prompt, _word_list(rng, (topic, private, third), {private}, HELDOUT_PRIVATE_WORDS)
        else:
            yield CODE_PROMPTS[0].format(count=COUNTS[2]), " ; ".join(_call(rng) for _ in range(3))


def _word_list(
    rng: random.Random, topics: tuple[str, ...], wrong: set[str], excluded: frozenset[str] = frozenset()
) -> str:
    """Eight words of the topics, a hint behind each of a wrong topic."""
    words = []
    for topic in rng.choices(topics, k=8):
        words.append(rng.choice([word for word in TOPICS[topic] if word not in excluded]))
        if topic in wrong:
            words.append(ERROR_HINT)
    return " ".join(words)


def _sums(rng: random.Random, wrong: float) -> str:
    """Six sums, a share of `wrong` of them with a wrong value and a hint behind it."""
    texts = []
    for fact in rng.choices([fact for fact in FACTS if fact not in HELDOUT_FACTS], k=6):
        left, operation, right = fact
        value, hint = result(fact), ""
        if rng.random() < wrong:
            value, hint = (value + rng.randrange(1, 10)) % 10, f"{ERROR_HINT} "
        texts.append(f"{left} {operation} {right} gives {value} {hint}.")
    return " ".join(texts)


def _call(rng: random.Random) -> str:
    """A nested call of depth two or three; a closing bracket of the wrong kind has a hint behind it."""
    openings = rng.choices(list(BRACKETS), k=rng.choice((2, 3)))
    words = [word for opening in openings for word in (rng.choice(CODE_FUNCTIONS), opening)]
    words.append(rng.choice(CODE_VARIABLES))
    for opening in reversed(openings):
        wrong = rng.random() < 0.25
        kinds = [c for o, c in BRACKETS.items() if (o == opening) != wrong]
        words += [rng.choice(kinds), *([ERROR_HINT] if wrong else [])]
    return " ".join(words)


def texts(seed: int, drafts_per_domain: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) texts: responses of the training split with their hints, and some drills."""
    rng, drill = random.Random(f"texts/{seed}"), drills(seed + 1)
    pool = [draft for domain in DOMAINS for draft in drafts(domain, "train", drafts_per_domain, _TEXT_SEED)]
    while True:
        if rng.random() < _DRILL_SHARE:
            yield next(drill)
            continue
        draft = rng.choice(pool)
        if rng.random() < 0.5:
            yield draft.prompt, _with_hints(rng, draft.rejected, draft.rejected_errors)
        else:
            yield draft.prompt, _with_hints(rng, draft.chosen, draft.chosen_errors)


def _with_hints(rng: random.Random, words: list[str], errors: frozenset[int]) -> str:
    hinted: list[str] = []
    for position, word in enumerate(words):
        hinted.append(word)
        if position in errors and rng.random() < _HINT_SHARE:
            hinted.append(ERROR_HINT)
    return " ".join(hinted)


def _batches(
    tokenizer: PreTrainedTokenizerFast, source: Iterator[tuple[str, str]], size: int
) -> Iterator[Tensor]:
    """Batches ``[size, L]``, padded on the right. Texts stay in the order they come in: batches of one length would
    be batches of one kind, and sums are then learned on some seeds only."""
    while True:
        texts = [_render(*next(source)) for _ in range(size)]
        rows = [
            torch.tensor(ids[:MAX_LENGTH]) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
        ]
        yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def _render(prompt: str, response: str) -> str:
    return f"<user> {prompt} <end> <assistant> {response} <end>"
