"""What a person sees after scoring: a table of rows, the errors, accuracy and speed."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adajudge.data import RowError
from adajudge.scoring import Score, ScoredRow

_TEXT_WIDTH = 34
_COLUMNS = {"id": 17, "prompt": 8, "reward": 13, "margin": 6, "last/mean/attn": 14, "winner": 8}


class Summary:
    """Counts results as they pass, and keeps the first ones, `table_rows` of them, for the table."""

    def __init__(self, table_rows: int) -> None:
        self.table_rows = table_rows
        self.shown: list[ScoredRow] = []
        self.errors: list[RowError] = []
        self.responses = 0
        self.rows = 0
        self.truncated = 0
        self.control_tokens = 0  # rows whose text holds some
        self.implicit_prompts = 0
        self.pairs: dict[str, list[int]] = {}  # domain -> [right, all]
        self.longer: list[int] = [0, 0, 0]  # pairs whose longer response is chosen, rejected; equal length
        self.seconds = 0.0
        self.tokens = 0

    def add(self, result: ScoredRow | RowError) -> None:
        """Count one result."""
        if isinstance(result, RowError):
            self.errors.append(result)
            return
        self.rows += 1
        self.responses += len(result.scores)
        self.truncated += any(score.truncated for score in result.scores)
        self.control_tokens += any(score.holds_control_tokens for score in result.scores)
        self.implicit_prompts += result.row.implicit_prompt
        if len(self.shown) < self.table_rows:
            self.shown.append(result)
        if result.row.kind == "pair" and not result.row.tie:
            counts = self.pairs.setdefault(str(result.row.extra.get("domain", "all")), [0, 0])
            counts[0] += result.margin > 0
            counts[1] += 1
            chosen, rejected = (score.response_tokens for score in result.scores)
            self.longer[0 if chosen > rejected else 1 if chosen < rejected else 2] += 1

    def print_table(self, console: Console) -> None:
        """One line a response list: reward, margin, view weights, winner."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name, width in _COLUMNS.items():  # the prompt gives way where the terminal is narrow
            numeric = name in ("reward", "margin")
            table.add_column(name, no_wrap=True, min_width=width, justify="right" if numeric else "left")
        for result in self.shown:
            margin, winner = "", ""
            if len(result.scores) > 1:
                margin = f"{result.margin:+.2f}"
                winner = str(result.winner) if result.row.kind == "pair" else f"#{result.winner}"
            rewards = " ".join(f"{score.reward:+.2f}" for score in result.scores[:4])
            prompt = result.row.prompt[-1].content if result.row.prompt else ""
            table.add_row(
                escape(result.row.id[:24]),
                escape(_short(prompt)),
                rewards,
                margin,
                _weights(result.scores[0]),
                winner,
            )
        console.print(table)
        for error in self.errors[: self.table_rows]:
            console.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)

    def print_figures(self, console: Console, card: Path | None) -> None:
        """Counts, speed, and for pairs the accuracy, beside the built-in judge's card if `card` is given."""
        line = f"{self.rows} rows, {self.responses} responses, {self.tokens} tokens in {self.seconds:.2f} s"
        rate = max(self.seconds, 1e-9)
        line += f": {self.rows / rate:,.0f} rows/s, {self.tokens / rate:,.0f} tokens/s"
        console.print(line, highlight=False, soft_wrap=True)
        for count, meaning in (
            (self.truncated, "truncated (flagged in the output)"),
            (
                self.control_tokens,
                "with control tokens of the tokenizer in their text (flagged in the output)",
            ),
            (
                self.implicit_prompts,
                "without a prompt: the words that both texts begin with were taken as one",
            ),
        ):
            if count:
                console.print(f"{count} rows {meaning}", highlight=False, soft_wrap=True)
        if not self.pairs:
            return
        right, total = (sum(counts[i] for counts in self.pairs.values()) for i in (0, 1))
        table = Table(title="accuracy on pairs (chosen above rejected)", title_justify="left", box=None)
        table.add_column("")
        for domain in self.pairs:
            table.add_column(escape(domain), justify="right")
        table.add_column("together", justify="right")
        table.add_row(
            "this judge, these rows",
            *(_percent(r, n) for r, n in self.pairs.values()),
            f"{_percent(right, total)} ({right}/{total})",
        )
        longer = self.longer[0] + self.longer[2] / 2
        table.add_row("longer response wins, these rows", *[""] * len(self.pairs), _percent(longer, total))
        for name, figures in _card_rows(card, list(self.pairs)):
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


def _weights(score: Score) -> str:
    return " ".join(f"{weight:.2f}" for weight in score.view_weights)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _TEXT_WIDTH else flat[: _TEXT_WIDTH - 1] + "…"
