"""Scorer: one score however it is asked, in order, nothing lost."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adajudge import Scorer
from adajudge.data import DataFileError, Message, Row, RowError
from adajudge.scoring import BUILT_IN_JUDGE

from tests.adajudge.chat_templates.families import family_tokenizer
from tests.adajudge.judges import BACKBONES

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "moon", "while", "it", "rained"]


@pytest.fixture(scope="module")
def tokenizer():
    return family_tokenizer("qwen3")


@pytest.fixture(scope="module")
def judge(tokenizer):
    from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification

    torch.manual_seed(0)
    backbone = BACKBONES["qwen3"]()
    backbone.vocab_size = len(tokenizer)
    backbone.max_position_embeddings = 200
    config = AdaJudgeConfig(
        backbone_config=backbone, num_blocks=2, expert_hidden_size=8, router_hidden_size=8
    )
    model = AdaJudgeForSequenceClassification(config)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def row(number, *responses, prompt="tell me"):
    kind = {1: "single", 2: "pair"}.get(len(responses), "candidates")
    return Row(str(number), number, kind, (Message("user", prompt),), responses)


def rows(count):
    for number in range(1, count + 1):
        text = " ".join(WORDS[: 1 + number % len(WORDS)])
        yield row(number, *[f"{text} {i}" for i in range(1 + number % 3)])


def test_results_keep_the_order_and_one_per_row(judge, tokenizer):
    results = list(Scorer(judge, tokenizer, window=7).score(rows(20)))
    assert [result.row.id for result in results] == [str(n) for n in range(1, 21)]
    assert [len(result.scores) for result in results] == [1 + n % 3 for n in range(1, 21)]


@pytest.fixture(scope="module")
def alone(judge, tokenizer):
    """Rewards of the responses of `rows(12)`, each asked for by itself."""
    scorer = Scorer(judge, tokenizer)
    return [scorer.score_response("tell me", text).reward for item in rows(12) for text in item.responses]


@pytest.mark.parametrize(("budget", "window"), [(1, 512), (100, 5), (8192, 1), (8192, 512)])
def test_scores_depend_on_no_batch(judge, tokenizer, alone, budget, window):
    scorer = Scorer(judge, tokenizer, token_budget=budget, window=window)
    together = [score.reward for result in scorer.score(rows(12)) for score in result.scores]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "adajudge"])
def test_scores_depend_on_no_attention_implementation(judge, tokenizer, alone, attention):
    before = judge.backbone.config._attn_implementation
    judge.set_attn_implementation(attention)
    together = [
        score.reward for result in Scorer(judge, tokenizer).score(rows(12)) for score in result.scores
    ]
    judge.set_attn_implementation(before)
    assert before == "sdpa"
    assert torch.allclose(torch.tensor(together), torch.tensor(alone), atol=1e-5)


def test_scores_are_the_models_own(judge, tokenizer):
    score = Scorer(judge, tokenizer).score_response("tell me", "the cat sat")
    encoded = Scorer(judge, tokenizer).encoder.encode((Message("user", "tell me"),), "the cat sat")
    out = judge(torch.tensor([encoded.input_ids]), response_mask=torch.tensor([encoded.response_mask]))
    assert score.reward == pytest.approx(out.logits.item(), abs=1e-6)
    assert score.view_weights == pytest.approx(out.view_weights[0].tolist(), abs=1e-6)
    assert (score.prompt_tokens, score.response_tokens) == (encoded.prompt_length, encoded.response_length)
    assert score.reward == pytest.approx(
        sum(s * w for s, w in zip(score.view_scores, score.view_weights, strict=True))
    )


def test_a_tokenizer_that_the_judge_was_not_trained_with_is_refused(judge, tokenizer, monkeypatch):
    boundary = Scorer(judge, tokenizer).encoder.boundary.to_dict()
    monkeypatch.setattr(judge.config, "turn_boundary", boundary)
    Scorer(judge, tokenizer)
    with pytest.raises(ValueError, match="is not the one that the judge was trained with"):
        Scorer(judge, family_tokenizer("phi3.5"))


def test_errors_pass_through_in_place(judge, tokenizer):
    bad = RowError(2, "x", "response", "missing")
    results = list(Scorer(judge, tokenizer).score([row(1, "the cat"), bad, row(3, "a mat")]))
    assert results[1] is bad
    assert [type(r).__name__ for r in results] == ["ScoredRow", "RowError", "ScoredRow"]


def test_a_response_that_does_not_fit_is_an_error_and_its_neighbours_are_scored(judge, tokenizer):
    results = list(Scorer(judge, tokenizer, max_length=40).score([row(1, "the cat"), row(2, "moon " * 100)]))
    assert results[0].scores
    assert isinstance(results[1], RowError)
    assert results[1].field.startswith("response")


def test_a_response_that_does_not_fit_is_cut_only_on_request(judge, tokenizer):
    scorer = Scorer(judge, tokenizer, max_length=40, truncate_response=True)
    score = scorer.score_response("tell me", "moon " * 100)
    assert score.truncated


def test_a_long_prompt_is_cut_and_flagged(judge, tokenizer):
    (result,) = Scorer(judge, tokenizer, max_length=40).score([row(1, "the cat", prompt="moon " * 100)])
    assert result.scores[0].truncated
    assert result.scores[0].prompt_tokens + result.scores[0].response_tokens == 40


def test_a_reward_that_is_not_finite_is_an_error(judge, tokenizer, monkeypatch):
    monkeypatch.setattr(judge.head.experts.view_out_bias, "data", torch.full((3,), math.nan))
    (result,) = Scorer(judge, tokenizer).score([row(1, "the cat")])
    assert isinstance(result, RowError)
    assert "not finite" in result.reason


def test_a_pairs_record_has_both_sides_and_the_margin(judge, tokenizer):
    (result,) = Scorer(judge, tokenizer).score([row(1, "the cat sat", "a mat")])
    record = result.to_record()
    assert record["margin"] == pytest.approx(record["chosen"]["reward"] - record["rejected"]["reward"])
    assert record["winner"] == ("chosen" if record["margin"] > 0 else "rejected")
    assert set(record["chosen"]) >= {"reward", "view_scores", "view_weights", "depth_weights", "truncated"}


def test_candidates_are_ranked(judge, tokenizer):
    (result,) = Scorer(judge, tokenizer).score([row(1, "the cat sat", "a mat", "moon", "it rained")])
    record = result.to_record()
    rewards = [candidate["reward"] for candidate in record["candidates"]]
    assert record["ranking"] == sorted(range(4), key=lambda i: -rewards[i])
    assert record["winner"] == record["ranking"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 0}, "token_budget: 0 came"),
        ({"window": 0}, "window: 0 came"),
        ({"max_length": 999}, "max_length: 999 came, but the backbone ends at 200"),
    ],
)
def test_impossible_options_are_refused(judge, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        Scorer(judge, tokenizer, **options)


def test_a_folder_without_a_judge_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        Scorer.from_pretrained(tmp_path)


def test_records_may_come_instead_of_rows(judge, tokenizer):
    scorer = Scorer(judge, tokenizer)
    record = {"prompt": "tell me", "response": "the cat sat"}
    good, bad = scorer.score([record, {"prompt": "tell me"}])
    assert good.scores[0] == scorer.score_response("tell me", "the cat sat")
    assert (bad.line, bad.field) == (2, "response")


def test_a_response_that_is_no_text_is_refused(judge, tokenizer):
    with pytest.raises(ValueError, match="response: expected a string, got NoneType"):
        Scorer(judge, tokenizer).score_response("tell me", None)
    with pytest.raises(ValueError, match="prompt: expected a string or messages, got NoneType"):
        Scorer(judge, tokenizer).score_response(None, "tell me")
    with pytest.raises(ValueError, match="rows: a dict came"):
        next(Scorer(judge, tokenizer).score({"prompt": "tell me", "response": "a"}))


def test_the_judges_own_limit_of_unknown_words_goes_with_its_folder(tmp_path):
    """Whoever names the folder gets the same refusals as whoever names none."""
    text = {"prompt": "Discuss Kant.", "response": "He wrote three critiques."}
    for scorer in (Scorer.from_pretrained(), Scorer.from_pretrained(BUILT_IN_JUDGE)):
        (result,) = scorer.score([text])
        assert "unknown to this judge" in result.reason
    (result,) = Scorer.from_pretrained(unknown_limit=1.0).score([text])
    assert math.isfinite(result.scores[0].reward)


def test_prompts_read_once_give_the_same_scores():
    alone, shared = (
        Scorer.from_pretrained(attn_implementation=name, unknown_limit=1.0) for name in (None, "adajudge")
    )
    three = [row(1, "it is four .", "it is five .", "I do not know", prompt="what is two plus two ?")]
    ours, expected = (next(scorer.score(three)).scores for scorer in (shared, alone))
    assert [s.reward for s in ours] == pytest.approx([s.reward for s in expected], abs=1e-4)


def test_rows_are_read_ahead_by_two_windows_at_most(judge, tokenizer):
    read = []

    def source():
        for item in rows(40):
            read.append(item)
            yield item

    results = Scorer(judge, tokenizer, window=4).score(source())
    next(results)
    assert len(read) == 12
    results.close()
    assert len(read) == 12
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("adajudge-encode")]


def test_what_was_read_before_a_broken_end_is_scored(judge, tokenizer):
    def source():
        yield from rows(6)
        raise DataFileError("broken behind line 6")

    results = Scorer(judge, tokenizer, window=4).score(source())
    assert [next(results).row.id for _ in range(6)] == ["1", "2", "3", "4", "5", "6"]
    with pytest.raises(DataFileError, match="behind line 6"):
        next(results)


def test_many_threads_encode_and_score_as_one_does(judge, tokenizer, alone):
    scorer = Scorer(judge, tokenizer)

    def score_all():
        encoded = [scorer.encode(item) for item in rows(12)]
        return [s.reward for items in encoded for s in scorer.score_encoded(items)]

    with ThreadPoolExecutor(4) as threads:
        for rewards in threads.map(lambda _: score_all(), range(8)):
            assert rewards == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ([{"role": "usr", "content": "tell me"}], "the cat", r"prompt\[0\]\.role: unknown role 'usr'"),
        ("tell \ud800", "the cat", "prompt: half of a surrogate pair"),
        ("tell me", "the \ud800", "response: half of a surrogate pair"),
        (b"tell", "the cat", "prompt: expected a string or messages, got bytes"),
    ],
)
def test_a_single_response_is_checked_as_a_row_is(judge, tokenizer, prompt, response, message):
    with pytest.raises(ValueError, match=message):
        Scorer(judge, tokenizer).score_response(prompt, response)


def test_messages_may_come_as_objects_or_mappings(judge, tokenizer):
    scorer = Scorer(judge, tokenizer)
    expected = scorer.score_response("tell me", "the cat sat")
    assert scorer.score_response([Message("user", "tell me")], "the cat sat") == expected
    assert scorer.score_response([{"role": "user", "content": "tell me"}], "the cat sat") == expected


@pytest.mark.parametrize(
    ("responses", "field"),
    [
        (("moon " * 100,), "response"),
        (("the cat", "moon " * 100), "rejected"),
        (("a", "b", "moon " * 100), "responses[2]"),
    ],
)
def test_an_error_names_the_response(judge, tokenizer, responses, field):
    (result,) = Scorer(judge, tokenizer, max_length=40).score([row(1, *responses)])
    assert result.field == field


def test_a_response_that_leaves_no_room_for_its_header_is_an_error(judge, tokenizer):
    scorer = Scorer(judge, tokenizer)
    whole = scorer.encoder.encode((Message("user", "tell me"),), "the cat sat on a mat")
    header = len(scorer.encoder.boundary.assistant_header_ids) + len(scorer.encoder.boundary.scaffold_ids)
    for room, is_scored in ((header, True), (header - 1, False)):
        short = Scorer(judge, tokenizer, max_length=whole.response_length + room)
        (result,) = short.score([row(1, "the cat sat on a mat")])
        assert isinstance(result, RowError) is not is_scored
    assert f"{header} more stand before it; max_length is" in result.reason
    assert result.field == "response"
