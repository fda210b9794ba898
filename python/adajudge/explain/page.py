"""Explanations as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from adajudge.data import Row, RowError
from adajudge.data.writing import write_text

from .explanation import Explanation, Part, Token

_VIEWS = ("last", "mean", "attention")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
article { border: 1px solid #d0d7de; border-radius: 6px; padding: 0 1rem 1rem; margin: 1.5rem 0; }
h2 { font-size: 1.05rem; } h3 { font-size: 1rem; margin: .6rem 0 .3rem; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; } .prompt { color: #57606a; }
table { border-collapse: collapse; font-size: .87rem; margin: .4rem 0; }
td, th { padding: .1rem .7rem .1rem 0; text-align: right; font-variant-numeric: tabular-nums; font-weight: normal; }
th { color: #57606a; } .error { color: #a40e26; } summary { cursor: pointer; color: #57606a; }
sub { color: #1b1f24; font-size: .72em; unicode-bidi: isolate; direction: ltr; } small { color: #57606a; }
"""
_LEGEND = (
    "Parts of a response: <span style='background:rgba(45,105,190,.45)'>blue</span> ones raise its reward, "
    "<span style='background:rgba(200,60,50,.45)'>red</span> ones lower it; the small number is the reward less that of the "
    "response without the part. Tokens: the darker, the more of what the router lets through is read there."
)


def write_page(
    path: str | os.PathLike[str], rows: Iterable[tuple[Row, list[Explanation]] | RowError], title: str
) -> None:
    """Write rows with their explanations, or errors in their place; the file is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    articles = "\n".join(_error(row) if isinstance(row, RowError) else _article(*row) for row in rows)
    page = (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1><p><small>{_LEGEND}</small></p>\n{articles}\n"
        "</body></html>\n"
    )
    write_text(path, page)


def _article(row: Row, explanations: Sequence[Explanation]) -> str:
    prompt = "\n".join(f"{message.role}: {message.content}" for message in row.prompt)
    most = max((abs(part.effect) for x in explanations for part in x.parts if part.effect), default=0.0)
    margin = ""
    if row.kind == "pair":
        difference = explanations[0].score.reward - explanations[1].score.reward
        margin = f" &middot; margin {difference:+.3f}"
    sides = "\n".join(_side(x, most) for x in explanations)
    return (
        f"<article><h2><bdi>{escape(row.id)}</bdi>{margin}</h2><div class='text prompt' dir='auto'>{escape(prompt)}</div>"
        f"<div class='sides'>{sides}</div></article>"
    )


def _side(x: Explanation, most: float) -> str:
    score = x.score
    views = "".join(
        f"<tr><th>{view}</th><td>{s:+.3f}</td><td>{pi:.3f}</td><td>{s * pi:+.3f}</td></tr>"
        for view, s, pi in zip(_VIEWS, score.view_scores, score.view_weights, strict=True)
    )
    depths = " ".join(f"{alpha:.3f}" for alpha in score.depth_weights)
    notes = ["holds control tokens"] * score.holds_control_tokens
    if score.truncated:
        notes.append("truncated: the judge has not read all of it, and no part's effect is measured")
    elif len(x.parts) == 1:
        notes.append("one part: there is no response without it")
    return (
        f"<section><h3>{escape(x.name)}: reward {score.reward:+.3f}</h3>"
        f"<div class='text' dir='auto'>{''.join(_part(part, most) for part in x.parts)}</div>"
        "<table><tr><th>view</th><th>score</th><th>weight</th><th>product</th></tr>"
        f"{views}<tr><th>reward</th><td></td><td></td><td>{score.reward:+.3f}</td></tr></table>"
        f"<small>depth weights {depths}{''.join(f' &middot; {note}' for note in notes)}</small>"
        f"<details><summary>tokens</summary><div class='text' dir='auto'>{_heat(x.tokens)}</div></details></section>"
    )


def _part(part: Part, most: float) -> str:
    text = escape(part.text.rstrip())
    space = part.text[len(part.text.rstrip()) :]
    if part.effect is None:
        return f"<bdi>{text}</bdi>{space}"
    color = "45,105,190" if part.effect > 0 else "200,60,50"
    strength = 0.6 * abs(part.effect) / most if most else 0.0
    tint = f"background:rgba({color},{strength:.2f})"
    return f"<span style='{tint}'><bdi>{text}</bdi>&thinsp;<sub>{part.effect:+.3g}</sub></span>{space}"


def _heat(tokens: Sequence[Token]) -> str:
    shown = list(_whole_characters(tokens))
    most = max(token.evidence for token in shown)
    return "".join(_token(token, token.evidence / most) for token in shown)


def _whole_characters(tokens: Sequence[Token]) -> Iterator[Token]:
    """Tokens that make one character together as one, with the sum of their weights."""
    attention = evidence = 0.0
    for token in tokens:
        attention, evidence = attention + token.attention, evidence + token.evidence
        if token.text or token is tokens[-1]:
            yield Token(token.text, token.is_response, attention, evidence)
            attention = evidence = 0.0


def _token(token: Token, strength: float) -> str:
    prompt = "" if token.is_response else " class='prompt'"
    return (
        f"<span{prompt} title='evidence {token.evidence:.4f}, attention {token.attention:.4f}' "
        f"style='background:rgba(222,140,20,{0.85 * strength:.2f})'>{escape(token.text)}</span>"
    )


def _error(error: RowError) -> str:
    return f"<article><p class='error'><bdi>{escape(str(error))}</bdi></p></article>"
