"""The tiny backbone: next-token training on texts of the world's training split.

Sound and faulty responses alike are shown; behind most errors stands a hint word that no judged response has.
To predict it, the states must tell an error from its surroundings: what a judge's head can then read.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from adajudge.builtin.tokenizer import MAX_LENGTH
from adajudge.builtin.words import (
    DRILL_PROMPT,
    ERROR_HINT,
    FACTS,
    HELDOUT_FACTS,
    MEMBERSHIP_PROMPT,
    TOPICS,
    result,
)
from adajudge.builtin.world import DOMAINS, drafts

_TEXT_SEED = 1  # of the world's drafts; head training and evaluation use others
_HINT_SHARE = 0.9
_DRILL_SHARE = 0.35  # of all texts: single sums, and which topic a word belongs to
_POOL = 50  # batches sorted by length together, so that little padding is computed


@dataclass(frozen=True)
class Schedule:
    """Optimiser steps and batch of the next-token training."""

    steps: int = 3000
    batch: int = 48
    peak: float = 3e-3
    warmup: int = 100
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
    optimiser = torch.optim.AdamW(model.parameters(), schedule.peak, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, schedule.peak, schedule.steps, pct_start=min(0.3, schedule.warmup / schedule.steps)
    )
    started, running = time.perf_counter(), 0.0
    for step, ids in zip(range(1, schedule.steps + 1), _batches(tokenizer, seed, schedule), strict=False):
        # Causal attention with padding on the right: real tokens never see it, and the loss leaves it out.
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = ids[:, 1:]
        real = targets != tokenizer.pad_token_id
        loss = F.cross_entropy(model.lm_head(states[real]), targets[real])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        running += loss.item()
        if step % max(1, schedule.steps // 10) == 0:
            window = max(1, schedule.steps // 10)
            seconds = time.perf_counter() - started
            print(f"  backbone {seed}: step {step}, loss {running / window:.3f}, {seconds:.0f} s", flush=True)
            running = 0.0
    return model.model.eval()


def texts(seed: int, drafts_per_domain: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, response) texts: responses of the training split with their hints, and drills."""
    rng = random.Random(f"texts/{seed}")
    pool = [draft for domain in DOMAINS for draft in drafts(domain, "train", drafts_per_domain, _TEXT_SEED)]
    known = [fact for fact in FACTS if fact not in HELDOUT_FACTS]
    members = [(word, topic) for topic, words in TOPICS.items() for word in words]
    while True:
        if rng.random() >= _DRILL_SHARE:
            draft = rng.choice(pool)
            faulty = rng.random() < 0.5
            words = draft.rejected if faulty else draft.chosen
            errors = draft.rejected_errors if faulty else draft.chosen_errors
            yield draft.prompt, _with_hints(rng, words, errors)
        elif rng.random() < 0.6:
            facts = rng.choices(known, k=6)
            yield DRILL_PROMPT, " ".join(_sum(rng, *fact) for fact in facts)
        else:
            word, topic = rng.choice(members)
            yield MEMBERSHIP_PROMPT.format(word=word), topic


def _with_hints(rng: random.Random, words: list[str], errors: frozenset[int]) -> str:
    hinted: list[str] = []
    for position, word in enumerate(words):
        hinted.append(word)
        if position in errors and rng.random() < _HINT_SHARE:
            hinted.append(ERROR_HINT)
    return " ".join(hinted)


def _sum(rng: random.Random, left: int, operation: str, right: int) -> str:
    value = result((left, operation, right))
    if rng.random() < 0.3:  # a wrong sum, so that drills too show what an error is
        return f"{left} {operation} {right} gives {(value + rng.randrange(1, 10)) % 10} {ERROR_HINT} ."
    return f"{left} {operation} {right} gives {value} ."


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int, schedule: Schedule) -> Iterator[torch.Tensor]:
    """Batches ``[batch, L]`` of texts of similar length, padded on the right."""
    source, rng = texts(seed, schedule.drafts_per_domain), random.Random(f"batches/{seed}")
    while True:
        pool = [_render(*next(source)) for _ in range(_POOL * schedule.batch)]
        encoded = sorted(tokenizer(pool, add_special_tokens=False)["input_ids"], key=len)
        groups = [encoded[i : i + schedule.batch] for i in range(0, len(encoded), schedule.batch)]
        rng.shuffle(groups)
        for group in groups:
            rows = [torch.tensor(ids[:MAX_LENGTH]) for ids in group]
            yield torch.nn.utils.rnn.pad_sequence(
                rows, batch_first=True, padding_value=tokenizer.pad_token_id
            )


def _render(prompt: str, response: str) -> str:
    return f"<user> {prompt} <end> <assistant> {response} <end>"
