"""What a person sees after scoring: a table of rows, the errors, how rewards are spread, accuracy and speed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adajudge.cli.histogram import print_distribution
from adajudge.data import Row, RowError
from adajudge.scoring.figures import Distribution, WindowFigures
from adajudge.scoring.parts import Part

_TEXT_WIDTH = 34
_COLUMNS = {"id": 17, "prompt": 8, "reward": 13, "margin": 6, "last/mean/attn": 14, "winner": 8}
_DOMAINS = 20
_OTHER_DOMAINS = "others"


class Summary:
    """Adds up what was scored, part after part, in memory that does not grow with it.

    Args:
        table_rows: so many rows of the input, the first ones, are kept for the table.
    """

    def __init__(self, table_rows: int) -> None:
        self.table_rows = table_rows
        self.total = WindowFigures()
        self.rewards = Distribution()
        self.margins = Distribution()
        self.seconds = 0.0
        self.rows_now = 0  # scored by this run; others were there
        self.tokens_now = 0
        self._prompts: dict[str, str] = {}  # by the row's id
        self._records: list[dict[str, Any]] = []
        self._errors: list[RowError] = []

    def watch(self, rows: Iterable[Row | RowError]) -> Iterator[Row | RowError]:
        """The rows as they come; the prompts of the first ones are kept for the table."""
        for row in rows:
            if isinstance(row, Row) and len(self._prompts) < self.table_rows:
                self._prompts[row.id] = _short(row.prompt[-1].content if row.prompt else "")
            yield row

    def add(self, part: Part, resumed: bool = False) -> None:
        """Count one part; `resumed`: an earlier run has scored it."""
        total, figures = self.total, part.figures
        if not resumed:
            self.rows_now += figures.rows + figures.errors
            self.tokens_now += figures.tokens
        for name in (
            "rows",
            "errors",
            "responses",
            "tokens",
            "truncated",
            "control_tokens",
            "implicit_prompts",
        ):
            setattr(total, name, getattr(total, name) + getattr(figures, name))
        for domain, counts in figures.pairs.items():
            known = domain in total.pairs or len(total.pairs) < _DOMAINS
            sums = total.pairs.setdefault(domain if known else _OTHER_DOMAINS, [0, 0])
            sums[:] = [a + b for a, b in zip(sums, counts, strict=True)]
        total.longer = [a + b for a, b in zip(total.longer, figures.longer, strict=True)]
        self.rewards.add(figures.rewards)
        self.margins.add(figures.margins)
        for line in part.records[: self.table_rows - len(self._records)]:
            self._records.append(json.loads(line))
        for line in part.errors[: self.table_rows - len(self._errors)]:
            self._errors.append(RowError(**json.loads(line)))

    def print_table(self, console: Console) -> None:
        """One line a row: reward of each response, margin, view weights, winner."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name, width in _COLUMNS.items():  # the prompt gives way where the terminal is narrow
            numeric = name in ("reward", "margin")
            table.add_column(name, no_wrap=True, min_width=width, justify="right" if numeric else "left")
        for record in self._records:
            if record["id"] in self._prompts:
                table.add_row(escape(record["id"][:24]), escape(self._prompts[record["id"]]), *_cells(record))
        console.print(table)
        for error in self._errors:
            console.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)

    def print_spread(self, console: Console) -> None:
        """Quantiles of rewards and margins, and a histogram of the rewards."""
        if self.rewards.count:
            print_distribution(console, {"reward": self.rewards, "margin": self.margins})

    def print_figures(self, console: Console, card: Path | None) -> None:
        """Counts, speed, and for pairs the accuracy, beside the built-in judge's card if `card` is given."""
        total, rate = self.total, max(self.seconds, 1e-9)
        line = f"{total.rows} rows, {total.responses} responses, {total.tokens} tokens"
        if self.rows_now < total.rows + total.errors:
            line += f"; of these now {self.rows_now} rows"
        line += f" in {self.seconds:.2f} s: {self.rows_now / rate:,.0f} rows/s, {self.tokens_now / rate:,.0f} tokens/s"
        console.print(line, highlight=False, soft_wrap=True)
        for count, meaning in (
            (total.truncated, "truncated (flagged in the output)"),
            (
                total.control_tokens,
                "with control tokens of the tokenizer in their text (flagged in the output)",
            ),
            (
                total.implicit_prompts,
                "without a prompt: the words that both texts begin with were taken as one",
            ),
        ):
            if count:
                console.print(f"{count} rows {meaning}", highlight=False, soft_wrap=True)
        if not total.pairs:
            return
        right, pairs = (sum(counts[i] for counts in total.pairs.values()) for i in (0, 1))
        table = Table(
            title="accuracy on pairs (chosen above rejected; a tie is wrong)", title_justify="left", box=None
        )
        table.add_column("")
        for domain in total.pairs:
            table.add_column(escape(domain), justify="right")
        table.add_column("together", justify="right")
        table.add_row(
            "this judge, these rows",
            *(_percent(r, n) for r, n in total.pairs.values()),
            f"{_percent(right, pairs)} ({right}/{pairs})",
        )
        longer = _percent(total.longer[0], pairs)
        table.add_row("longer response wins, these rows", *[""] * len(total.pairs), longer)
        for name, figures in _card_rows(card, list(total.pairs)):
            table.add_row(name, *figures)
        console.print(table)


def _card_rows(card: Path | None, domains: list[str]) -> list[tuple[str, list[str]]]:
    """Rows of the built-in judge's card, if it knows the domains: accuracy of the judge and of simpler poolings."""
    if card is None or not card.is_file():
        return []
    accuracies = json.loads(card.read_text(encoding="utf-8"))["test_accuracy"]
    if any(domain not in figures for figures in accuracies.values() for domain in domains):
        return []  # rows of another kind than the card's
    return [
        (f"{name} (card, test split)", [*(f"{100 * figures[d]:.1f}" if d in figures else "" for d in domains),
                                        f"{100 * figures['average']:.1f}"])
        for name, figures in accuracies.items()
    ]  # fmt: skip


def _percent(part: float, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else ""


def _cells(record: dict[str, Any]) -> tuple[str, str, str, str]:
    """Rewards, margin, view weights and winner of an output record of any kind."""
    if "reward" in record:
        scores, winner = [record], ""
    elif "chosen" in record:
        scores, winner = [record["chosen"], record["rejected"]], record["winner"]
    else:
        scores, winner = record["candidates"], f"#{record['winner']}"
    rewards = [score["reward"] for score in scores]
    margin = f"{rewards[0] - max(rewards[1:]):+.2f}" if len(rewards) > 1 else ""
    weights = " ".join(f"{weight:.2f}" for weight in scores[0]["view_weights"])
    return " ".join(f"{reward:+.2f}" for reward in rewards[:4]), margin, weights, winner


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _TEXT_WIDTH else flat[: _TEXT_WIDTH - 1] + "…"
