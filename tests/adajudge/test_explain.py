"""Explanations: exact where they say what the judge computed, and measured where they say what a part adds."""

import json
import re

import pytest
import torch
from adajudge import Scorer
from adajudge.cli import main
from adajudge.data import EncodedRow, Message, Row, RowError, read_rows
from adajudge.explain import Explanation, Part, Token, explain, write_page
from adajudge.explain.explanation import attention_weights, split
from adajudge.explain.token_texts import token_texts
from adajudge.scoring import Score
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from tests.adajudge.chat_templates.families import NAMES, family_tokenizer
from tests.adajudge.judges import random_judge
from tests.test_readme import ROOT


@pytest.fixture(scope="module")
def scorer():
    return Scorer.from_pretrained(unknown_limit=1.0)


@pytest.fixture(scope="module")
def row():
    return next(iter(read_rows(ROOT / "examples/pairs.jsonl")))


def test_the_views_make_the_reward_and_the_weights_are_shares(scorer, row):
    names = []
    for item in explain(scorer, row):
        names.append(item.name)
        products = (s * pi for s, pi in zip(item.score.view_scores, item.score.view_weights, strict=True))
        assert sum(products) == pytest.approx(item.score.reward, abs=1e-5)
        assert sum(token.attention for token in item.tokens) == pytest.approx(1, abs=1e-9)
        assert sum(token.evidence for token in item.tokens) == pytest.approx(1, abs=1e-5)
        assert sum(token.is_response for token in item.tokens) == item.score.response_tokens
        last, mean, attended = item.score.view_weights
        expected = last + mean / item.score.response_tokens + attended * item.tokens[-1].attention
        assert item.tokens[-1].evidence == pytest.approx(expected, abs=1e-6)
    assert names == ["chosen", "rejected"]


@pytest.mark.parametrize("attention_tokens", ["all", "response"])
def test_the_attention_is_what_the_fused_view_reads(scorer, row, attention_tokens, monkeypatch):
    """``sum_t beta_t H~_t`` of the explanation is the attention view of the kernels."""
    pooling = scorer.model.head.pooling
    monkeypatch.setattr(pooling, "attention_tokens", attention_tokens)
    caught = []
    hook = pooling.register_forward_hook(lambda _, inputs, views: caught.append((inputs, views)))
    (sequence, _) = scorer.encode(row)
    beta = attention_weights(scorer.model, sequence)
    hook.remove()
    (((states, alpha, _), views),) = caught
    mixed = torch.einsum("k,ktd->td", alpha[0].double(), torch.stack(states).double())
    torch.testing.assert_close(beta @ mixed, views.attention[0].double(), atol=1e-4, rtol=1e-4)
    in_prompt = beta[: sequence.prompt_length]
    assert (in_prompt > 0).all() if attention_tokens == "all" else (in_prompt == 0).all()


def test_windows_shorter_than_the_sequence_are_served():
    judge = random_judge("mistral", "adajudge")
    sequence = EncodedRow(list(range(1, 31)), prompt_length=12)
    assert attention_weights(judge, sequence).sum() == pytest.approx(1)
    assert judge.config._attn_implementation == "adajudge"


def test_an_effect_is_what_scoring_without_the_part_says(scorer, row):
    for response, item in zip(row.responses, explain(scorer, row), strict=True):
        texts = [part.text for part in item.parts]
        assert "".join(texts) == response
        assert len(texts) == 3
        whole = scorer.score_response(row.prompt, response).reward
        assert item.score.reward == pytest.approx(whole, abs=1e-4)
        for i, part in enumerate(item.parts):
            rest = scorer.score_response(row.prompt, "".join(texts[:i] + texts[i + 1 :])).reward
            assert part.effect == pytest.approx(whole - rest, abs=1e-3)


def test_a_response_of_one_part_has_no_effect(scorer):
    row = Row("x", 1, "candidates", (Message("user", "hello"),), ("one sentence .", "two . parts ."))
    one, two = explain(scorer, row)
    assert one.parts == (Part("one sentence .", None),)
    assert [part.effect is None for part in two.parts] == [False, False]
    assert (one.name, two.name) == ("responses[0]", "responses[1]")


def test_of_a_response_that_was_cut_no_effect_is_measured():
    """Without a part other text would take its room."""
    scorer = Scorer.from_pretrained(unknown_limit=1.0, max_length=24, truncate_response=True)
    long = " . ".join(f"the ball {i}" for i in range(20))
    row = Row("x", 1, "candidates", (Message("user", "hello"),), (long, "the ball . the goal ."))
    cut, whole = explain(scorer, row)
    assert cut.score.truncated
    assert {part.effect for part in cut.parts} == {None}
    assert None not in {part.effect for part in whole.parts}


def test_what_would_not_be_scored_has_no_effect():
    """A rest of white space, and one of unknown words."""
    scorer = Scorer.from_pretrained(unknown_limit=0.3)
    prompt = (Message("user", "tell me"),)
    (item,) = explain(scorer, Row("x", 1, "single", prompt, ("\n\nthe ball .",)))
    assert [part.effect is None for part in item.parts] == [False, True]
    response = "xylophone quartz . the ball and the goal and the ball and the goal ."
    (item,) = explain(scorer, Row("x", 1, "single", prompt, (response,)))
    assert [part.effect is None for part in item.parts] == [False, True]


def llama_2_tokenizer():
    """It takes the first space away when it decodes."""
    tokenizer = family_tokenizer("mistral")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@pytest.mark.parametrize("family", [*NAMES, "llama2"])
@pytest.mark.parametrize(
    "text", ["the quick brown fox . hello", "你好 👋 fine", "a\n\n  b\tc", "é" * 5 + " ﷺ"]
)
def test_token_texts_make_the_text(family, text):
    tokenizer = llama_2_tokenizer() if family == "llama2" else family_tokenizer(family)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(texts)


def test_a_row_that_cannot_be_scored_is_an_error():
    strange = Row("x", 7, "single", (Message("user", "hello"),), ("xylophone zebra quartz .",))
    error = explain(Scorer.from_pretrained(), strange)
    assert isinstance(error, RowError)
    assert "unknown to this judge" in error.reason


@given(st.text(alphabet="ab.!? \n。", min_size=1, max_size=300))
def test_parts_make_the_response(text):
    parts = split(text)
    assert "".join(parts) == text
    assert all(parts)
    assert len(parts) <= 40


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ("See e.g. this. Then that.", ["See e.g. this. ", "Then that."]),
        ("1. First.\n2. Second.", ["1. First.\n", "2. Second."]),
        ('He said "yes." She left.', ['He said "yes." ', "She left."]),
        ("“你好。”他说。再见。。。", ["“你好。”", "他说。", "再见。。。"]),
        ("no end", ["no end"]),
    ],
)
def test_parts_are_sentences(text, parts):
    assert split(text) == parts


def test_a_page_shows_the_numbers(tmp_path):
    """Products of score and weight; blue where a part raises the reward, red where it lowers it, as strong as it does."""
    score = Score(0.25, (1.0, -2.0, 3.0), (0.25, 0.5, 0.25), (0.125, 0.875), 3, 2, False, 0.0, False)
    tokens = tuple(
        Token(*x) for x in (("p", False, 0.5, 0.125), ("", True, 0.25, 0.25), ("é", True, 0.25, 0.5))
    )
    parts = (Part("up. ", 0.5), Part("down. ", -0.0025), Part("same.", None))
    row = Row("x", 1, "single", (Message("user", "p"),), ("up. down. same.",))
    write_page(tmp_path / "page.html", [(row, [Explanation("response", score, tokens, parts)])], "t")
    page = (tmp_path / "page.html").read_text()
    for view, product in (("last", "+0.250"), ("mean", "-1.000"), ("attention", "+0.750")):
        assert re.search(rf"<th>{view}</th><td>.*?</td><td>.*?</td><td>{re.escape(product)}</td>", page)
    shown = re.findall(
        r"rgba\((\d+),\d+,\d+,([\d.]+)\)'><bdi>(\w+)\.</bdi>&thinsp;<sub>([-+.\de]+)</sub>", page
    )
    assert shown == [("45", "0.60", "up", "+0.5"), ("200", "0.00", "down", "-0.0025")]
    assert "<bdi>same.</bdi></div>" in page
    heat = re.findall(
        r"title='evidence ([\d.]+), attention ([\d.]+)' style='background:rgba\([\d,]+,([\d.]+)\)'>(.)<", page
    )
    assert heat == [("0.1250", "0.5000", "0.14", "p"), ("0.7500", "0.5000", "0.85", "é")]


def test_a_page_shows_text_as_text(scorer, tmp_path):
    bad = "<script>alert(1)</script> . 'a' & \"b\" ."
    row = Row(bad, 1, "single", (Message("user", bad),), (bad,))
    write_page(tmp_path / "page.html", [(row, explain(scorer, row)), row.error(bad, bad)], bad)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert "http" not in page


def test_the_command_line(tmp_path, capsys):
    examples = str(ROOT / "examples/pairs.jsonl")
    assert main(["explain", examples, "--output", str(tmp_path / "x.html"), "--rows", "14"]) == 1
    out, err = capsys.readouterr()
    assert "13 rows explained" in out
    assert "line 14 (id 'broken-1')" in err
    assert (tmp_path / "x.html").read_text().count("<article>") == 14
    assert main(["explain", examples, "--output", str(tmp_path / "x.jsonl"), "--rows", "2"]) == 0
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").open()]
    assert [len(record["explanations"]) for record in records] == [2, 2]
    assert records[0]["explanations"][0]["parts"][0].keys() == {"text", "effect"}
    tie = {"context": [{"role": "user", "content": "hello"}], "response1": "the ball .", "response2": "the goal .",
           "overall_preference": 0}  # fmt: skip
    (tmp_path / "tie.jsonl").write_text(json.dumps(tie) + "\n")
    assert (
        main(
            ["explain", str(tmp_path / "tie.jsonl"), "--output", str(tmp_path / "x.jsonl"), "--allow_unknown"]
        )
        == 0
    )
    assert "1 rows explained" in capsys.readouterr().out
    for target, reason in (("x.txt", "unknown extension"), ("none/x.html", "a folder that exists")):
        assert main(["explain", examples, "--output", str(tmp_path / target)]) == 2
        assert reason in capsys.readouterr().err
