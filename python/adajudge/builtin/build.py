"""``python -m adajudge.builtin.build``: the built-in judge from nothing, with every figure of its card.

World, backbones, heads and baselines are trained and compared over several seeds; the judge of the first seeds
is written with its tokenizer, `results.json` and a model card made from it. Everything is tuned on validation
pairs; test and held-out pairs are evaluated once, at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Model

from adajudge.builtin import checks
from adajudge.builtin.card import write_card
from adajudge.builtin.pretrain import Schedule, pretrain
from adajudge.builtin.tokenizer import build_tokenizer
from adajudge.builtin.train_heads import (
    HEAD_HIDDEN,
    HEADS,
    CachedPair,
    Recipe,
    accuracies,
    build_judge_head,
    cache_states,
    train_head,
    view_weights,
)
from adajudge.builtin.world import DOMAINS, Row, rows
from adajudge.configuration import AdaJudgeConfig
from adajudge.data import ConversationEncoder
from adajudge.modeling import AdaJudgeForSequenceClassification

SHIPPED = Path(__file__).parent / "judge"
JUDGE = "AdaJudge K=2"

# Seeds of the world's pairs, one a purpose (the backbone's texts use seed 1).
_SEEDS = {"train": 2, "validation": 3, "test": 40961, "heldout": 40962}


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    schedule: Schedule
    recipe: Recipe
    judge_recipe: Recipe
    backbone_seeds: tuple[int, ...]
    head_seeds: tuple[int, ...]
    judge_seeds: tuple[int, ...]
    pairs: int
    evaluation_pairs: int


FULL = Plan(
    Schedule(),
    Recipe(learning_rate=1e-2),
    Recipe(learning_rate=2e-3),
    backbone_seeds=(0, 1, 2),
    head_seeds=(0, 1),
    judge_seeds=(0,),
    pairs=1500,
    evaluation_pairs=500,
)
QUICK = Plan(
    Schedule(fact_steps=4, sum_steps=4, drill_steps=4, steps=8, batch=8, drafts_per_domain=60),
    Recipe(learning_rate=1e-2, steps=4, pairs=4, evaluations=1),
    Recipe(learning_rate=2e-3, steps=4, pairs=4, evaluations=1),
    backbone_seeds=(0,),
    head_seeds=(0, 1),
    judge_seeds=(0, 1),
    pairs=16,
    evaluation_pairs=8,
)


def world_rows(split: str, count: int) -> list[Row]:
    """`count` pairs of every domain of a split, with the split's own seed."""
    return [row for domain in DOMAINS for row in rows(domain, split, count, _SEEDS[split])]


def build(output: Path, plan: Plan) -> dict[str, Any]:
    """Train everything, write the judge to `output`, and return the results."""
    started = time.perf_counter()
    tokenizer = build_tokenizer()
    pairs = {
        split: world_rows(split, plan.pairs if split == "train" else plan.evaluation_pairs)
        for split in _SEEDS
    }
    results: dict[str, Any] = {"plan": _plan_figures(plan), "baselines": _baselines(pairs), "runs": []}
    shipped: tuple[Qwen3Model, nn.Module] | None = None
    for backbone_seed in plan.backbone_seeds:
        backbone = pretrain(tokenizer, backbone_seed, plan.schedule)
        cached = {split: cache_states(backbone, tokenizer, found) for split, found in pairs.items()}
        for name, head_seed, head in _heads(plan, backbone.config.hidden_size):
            recipe = plan.judge_recipe if name == JUDGE else plan.recipe
            train_head(head, cached["train"], cached["validation"], head_seed, recipe)
            run = _evaluate(name, backbone_seed, head_seed, head, cached)
            results["runs"].append(run)
            seconds = time.perf_counter() - started
            print(
                f"  {name}, head {head_seed}: validation {run['validation']['average']:.3f}, {seconds:.0f} s",
                flush=True,
            )
            if shipped is None and name == JUDGE:
                shipped = backbone, head
    assert shipped is not None
    results["test_accuracy"] = _summary(results["runs"], "test")
    results["heldout_accuracy"] = _summary(results["runs"], "heldout")
    results["fp16"] = _save(output, tokenizer, *shipped, pairs["test"], results)
    results["seconds"] = round(time.perf_counter() - started)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_card(output / "README.md", results, JUDGE)
    return results


def _heads(plan: Plan, hidden_size: int) -> list[tuple[str, int, nn.Module]]:
    """The judge first, then what it is compared with, each from its own seed."""
    made = []
    for seeds, names in ((plan.judge_seeds, [JUDGE]), (plan.head_seeds, list(HEADS))):
        for name in names:
            for seed in seeds:
                torch.manual_seed(seed)
                make = build_judge_head if name == JUDGE else HEADS[name]
                made.append((name, seed, make(hidden_size)))
    return made


def _evaluate(
    name: str, backbone_seed: int, head_seed: int, head: nn.Module, cached: dict[str, list[CachedPair]]
) -> dict[str, Any]:
    run: dict[str, Any] = {"head": name, "backbone_seed": backbone_seed, "head_seed": head_seed}
    for split in ("validation", "test", "heldout"):
        run[split] = accuracies(head, cached[split])
    if name.startswith("AdaJudge"):
        run["view_weights"] = view_weights(head, cached["test"])
    return run


def _baselines(pairs: dict[str, list[Row]]) -> dict[str, dict[str, float]]:
    """Accuracy by domain on the test pairs of what reads no meaning."""
    found: dict[str, dict[str, float]] = {
        "length": {},
        "bag of words": {},
        "bigrams": {},
        "prompt overlap": {},
    }
    for domain in DOMAINS:
        train, test = ([row for row in pairs[s] if row["domain"] == domain] for s in ("train", "test"))
        found["length"][domain] = checks.length_accuracy(test)
        found["bag of words"][domain] = checks.bag_of_words_accuracy(train, test)
        found["bigrams"][domain] = checks.bigram_accuracy(train, test)
        found["prompt overlap"][domain] = checks.overlap_accuracy(test)
    return {name: by | {"average": statistics.mean(by.values())} for name, by in found.items()}


def _summary(runs: Sequence[dict[str, Any]], split: str) -> dict[str, dict[str, float]]:
    """Mean over the runs of each head by domain, and the standard deviation of the average."""
    summary: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run["head"] for run in runs):
        own = [run[split] for run in runs if run["head"] == name]
        summary[name] = {key: statistics.mean(run[key] for run in own) for key in own[0]}
        averages = [run["average"] for run in own]
        summary[name]["sd"] = statistics.stdev(averages) if len(averages) > 1 else 0.0
    return summary


def _save(
    output: Path,
    tokenizer: PreTrainedTokenizerFast,
    backbone: Qwen3Model,
    head: nn.Module,
    test: Sequence[Row],
    results: dict[str, Any],
) -> dict[str, float]:
    """Write the judge in fp16; returns its test accuracy as written beside that in fp32."""
    config = AdaJudgeConfig(
        backbone_config=copy.deepcopy(backbone.config),
        num_blocks=2,
        expert_hidden_size=HEAD_HIDDEN,
        router_hidden_size=HEAD_HIDDEN,
        turn_boundary=ConversationEncoder(tokenizer).boundary.to_dict(),
        unknown_word_limit=0.1,  # it knows a few hundred words
    )
    model = AdaJudgeForSequenceClassification(config, backbone)
    model.head.load_state_dict(head.state_dict())
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    stored = AdaJudgeForSequenceClassification.from_pretrained(output, dtype=torch.float32).eval()
    cached = cache_states(stored.backbone, tokenizer, test)
    judge_run = next(run for run in results["runs"] if run["head"] == JUDGE)
    return {"fp32": judge_run["test"]["average"], "stored": accuracies(stored.head, cached)["average"]}


def _plan_figures(plan: Plan) -> dict[str, Any]:
    return {
        "fact_steps": plan.schedule.fact_steps,
        "sum_steps": plan.schedule.sum_steps,
        "drill_steps": plan.schedule.drill_steps,
        "backbone_steps": plan.schedule.steps,
        "backbone_batch": plan.schedule.batch,
        "backbone_seeds": len(plan.backbone_seeds),
        "head_seeds": len(plan.head_seeds),
        "judge_seeds": len(plan.judge_seeds),
        "head_steps": plan.recipe.steps,
        "head_learning_rate": plan.recipe.learning_rate,
        "judge_learning_rate": plan.judge_recipe.learning_rate,
        "pairs_per_domain": plan.pairs,
        "evaluation_pairs_per_domain": plan.evaluation_pairs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``--output DIR`` (default: the shipped folder), ``--quick`` to try the pipeline in seconds."""
    parser = argparse.ArgumentParser(prog="python -m adajudge.builtin.build", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for the judge; default: the shipped one")
    parser.add_argument(
        "--quick", action="store_true", help="a useless judge in seconds, to try the pipeline"
    )
    args = parser.parse_args(arguments)
    if args.quick and args.output is None:
        parser.error("--quick needs --output: its judge is useless and must not replace the shipped one")
    results = build(args.output or SHIPPED, QUICK if args.quick else FULL)
    for name, figures in {**results["baselines"], **results["test_accuracy"]}.items():
        print(f"{name:<32} " + "  ".join(f"{key} {100 * value:.1f}" for key, value in figures.items()))
    print(f"written in {results['seconds']} s: {args.output or SHIPPED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
