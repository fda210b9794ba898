"""The built-in judge's model card, made from its measured results."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from adajudge.builtin.world import DOMAINS

_INTRODUCTION = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, adajudge]
---

# The built-in judge

A complete AdaJudge reward model in miniature: it shows what the software does, on any machine, in seconds. It knows
about 300 words and four kinds of task of a generated world. **It cannot judge ordinary text**; `adajudge score`
refuses rows in which more than a tenth of the words are unknown to it.

## What it was trained on

Only text that `adajudge.builtin.world` generates: no human text, no personal data. The two sides of a pair have the
same length and differ in a few words.

| domain | what decides | where the evidence lies |
| --- | --- | --- |
| math | the last value of a chain of sums modulo ten is right | the end |
| chat | nine or ten of fourteen topic words are on the topic asked for, not four or five | spread out |
| code | every bracket is closed by its own kind | local structure |
| safety | no word of the topic that the prompt makes private | one token anywhere |
"""


def write_card(path: Path, results: dict[str, Any], judge: str) -> None:
    """Write the card; every number in it comes from `results`."""
    plan, fp16 = results["plan"], results["fp16"]
    parts = [
        _INTRODUCTION,
        f"""
A Qwen3-configuration backbone (d = 128, 5 layers, about one million parameters) learned next-token prediction in
batches of {plan["backbone_batch"]} texts, in four phases:

1. facts, {plan["fact_steps"]} steps: true sums, pairs of digits that are the same or not, the topic of a word;
2. sums, {plan["sum_steps"]} steps: right or wrong;
3. drills, {plan["drill_steps"]} steps: short texts that each show one thing;
4. sound and faulty texts of the training split, {plan["backbone_steps"]} steps.

In faulty texts the word "oops" follows nine errors of ten, and random words count a twentieth in the loss. That is a
strong hint at what an error is; no judged response has the word. The backbone was then frozen.

The heads, of which the judge's has K = 2 refinement blocks, learned from {plan["pairs_per_domain"]} pairs a domain in
{plan["head_steps"]} steps with the focal Bradley-Terry loss (gamma 2, entropy floor 0.5, weight 0.1), at learning rate
{plan["judge_learning_rate"]} for K = 2 and {plan["head_learning_rate"]} for the others. Recipes were chosen on validation
pairs. Weights are stored in fp16: test accuracy {_percent(fp16["stored"])} % as stored, {_percent(fp16["fp32"])} % before.

## Accuracy on the test split

Per cent of pairs with the chosen side strictly above; {plan["evaluation_pairs_per_domain"]} pairs a domain, a seed used for
nothing else. Means over {plan["backbone_seeds"]} x {plan["head_seeds"]} runs, by seeds of the backbone and of the head
({plan["backbone_seeds"]} x {plan["judge_seeds"]} of {judge}); sd is that of the average over these runs, mostly from
backbone to backbone. All heads read the same frozen states; "last token", "mean" and "attention" are the usual single
poolings with an MLP of the same width. The shipped judge is the first run.

""",
        _table({**results["baselines"], **results["test_accuracy"]}),
        """
## Accuracy on held-out content

Pairs decided by what no training pair showed: sums, topic pairs, private words and code names kept apart.

""",
        _table(results["heldout_accuracy"]),
        "\n## What the comparison shows\n\n",
        _findings(results, judge),
        f"""
## View weights

Mean weight that the router of {judge} gives each view on the test split (last, mean, attention), per backbone and
head seed. They are a property of a run more than of a domain; do not read them as an explanation.

| backbone, head | {" | ".join(DOMAINS)} |
| --- | {" | ".join("---" for _ in DOMAINS)} |
""",
        *(
            f"| {run['backbone_seed']}, {run['head_seed']} | "
            + " | ".join(" ".join(f"{weight:.2f}" for weight in run["view_weights"][d]) for d in DOMAINS)
            + " |\n"
            for run in results["runs"]
            if run["head"] == judge
        ),
        f"""
## Again from nothing

`make judge` (or `python -m adajudge.builtin.build`) trains all of the above on a CPU; it took
{results["seconds"] / 60:.0f} minutes on the two cores it was made on. Every figure is in `results.json`.
""",
    ]
    path.write_text("".join(parts), encoding="utf-8")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(rows: dict[str, dict[str, float]]) -> str:
    columns = [*DOMAINS, "average", "sd"]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, figures in rows.items():
        cells = [_percent(figures[column]) if column in figures else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _findings(results: dict[str, Any], judge: str) -> str:
    """Who wins where, said by the figures themselves."""
    lines = []
    for split in ("test", "heldout"):
        accuracy = results[f"{split}_accuracy"]
        for domain in [*DOMAINS, "average"]:
            ranked = sorted(accuracy, key=lambda name: -accuracy[name][domain])
            first, second = ((name, _percent(accuracy[name][domain])) for name in ranked[:2])
            lines.append(
                f"- {split}, {domain}: {first[0]} {first[1]}, then {second[0]} {second[1]}; "
                f"{judge} ranks {ranked.index(judge) + 1} of {len(ranked)}."
            )
    for seed in sorted({run["backbone_seed"] for run in results["runs"]}):
        own = [run for run in results["runs"] if run["backbone_seed"] == seed]
        told = ", ".join(
            f"{name} {_percent(mean(run['test']['average'] for run in own if run['head'] == name))}"
            for name in dict.fromkeys(run["head"] for run in own)
        )
        lines.append(f"- Test average on backbone {seed}: {told}.")
    differences = _paired(results["runs"], "AdaJudge K=0", "AdaJudge K=0, uniform router")
    told = ", ".join(f"{100 * difference:+.1f}" for difference in differences)
    lines.append(
        f"- Routing alone: AdaJudge K=0 less the same head with the router forced uniform, run by run: {told} points."
    )
    lines.append(
        f"- {judge} differs from every other row in its refinement blocks and its learning rate, and is compared with "
        "unrefined heads only: a difference is that of refinement and pooling together, not of routing."
    )
    return "\n".join(lines) + "\n"


def _paired(runs: list[dict[str, Any]], first: str, second: str) -> list[float]:
    """Difference of two heads' average test accuracy for each pair of backbone and head seed."""

    def by_seeds(name: str) -> dict[tuple[int, int], float]:
        own = (run for run in runs if run["head"] == name)
        return {(run["backbone_seed"], run["head_seed"]): run["test"]["average"] for run in own}

    ours, theirs = by_seeds(first), by_seeds(second)
    return [ours[seeds] - theirs[seeds] for seeds in ours]
