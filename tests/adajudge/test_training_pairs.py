"""Files to pairs: every record is accounted for."""

import json

import pytest
from adajudge.data import ConversationEncoder, DataFileError
from adajudge.training import PairDataset, load_pairs

from tests.adajudge.chat_templates.families import family_tokenizer
from tests.adajudge.toy_training import toy_rows, write_rows

HELPSTEER = {
    "context": [{"role": "user", "content": "hello"}],
    "response1": "The sky is blue.",
    "response2": "an answer",
    "overall_preference": 0,
}


@pytest.fixture(scope="module")
def encoder():
    return ConversationEncoder(family_tokenizer("qwen3"), 40)


def test_every_record_is_in_exactly_one_count(encoder, tmp_path):
    good = toy_rows(2)
    rows = [
        *good,
        HELPSTEER,
        HELPSTEER | {"overall_preference": 2},
        {"prompt": "hello " * 30, "chosen": "blue", "rejected": "grass"},
        {"prompt": "hello", "chosen": "blue " * 50, "rejected": "grass"},
        {"prompt": "hello", "chosen": "blue"},
        {"prompt": "hello", "response": "blue"},
        "{broken",
    ]
    loaded = load_pairs(write_rows(tmp_path / "pairs.jsonl", rows), encoder)
    assert len(loaded.dataset) == 4
    assert [(row.line, row.field) for row in loaded.bad_rows] == [(7, "rejected"), (8, "row"), (9, "row")]
    assert [(row.line, row.field) for row in loaded.too_long] == [(6, "response")]
    assert (loaded.ties, loaded.prompts_cut, loaded.responses_cut) == (1, 1, 0)
    assert len(rows) == len(loaded.dataset) + len(loaded.bad_rows) + len(loaded.too_long) + loaded.ties
    for part in (
        "4 pairs",
        "1 ties",
        "1 with the beginning of the prompt cut",
        "1 left out because",
        "3 bad rows",
    ):
        assert part in loaded.summary()


def test_cut_prompts_keep_their_response(encoder, tmp_path):
    row = {"prompt": "hello " * 30, "chosen": "The sky is blue.", "rejected": "grass"}
    short = {"prompt": "hello", "chosen": "The sky is blue.", "rejected": "grass"}
    cut, whole = load_pairs(write_rows(tmp_path / "pairs.jsonl", [row, short]), encoder).dataset
    assert len(cut.chosen) == 40
    assert cut.chosen.response_ids == whole.chosen.response_ids


def test_a_cut_response_is_counted(tmp_path):
    encoder = ConversationEncoder(family_tokenizer("qwen3"), 40, truncate_response=True)
    row = {"prompt": "hello", "chosen": "blue " * 50, "rejected": "grass"}
    loaded = load_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), encoder)
    assert (len(loaded.dataset), loaded.responses_cut, loaded.too_long) == (1, 1, [])


def test_pairs_come_back_as_they_were_encoded(encoder, tmp_path):
    rows = [*toy_rows(3), HELPSTEER | {"overall_preference": -3}]
    dataset = load_pairs(write_rows(tmp_path / "pairs.jsonl", rows), encoder).dataset
    assert isinstance(dataset, PairDataset)
    for row, pair in zip(toy_rows(3), dataset, strict=False):
        for side in ("chosen", "rejected"):
            expected = encoder.encode([{"role": "user", "content": row["prompt"]}], row[side])
            got = getattr(pair, side)
            assert (got.input_ids, got.prompt_length) == (expected.input_ids, expected.prompt_length)
    assert dataset[-1].weight == pytest.approx(3**0.5)
    assert dataset.tokens == sum(len(pair.chosen) + len(pair.rejected) for pair in dataset)


def test_candidates_are_no_pair(encoder, tmp_path):
    row = {"prompt": "hello", "responses": ["blue", "grass", "sky"]}
    (bad,) = load_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), encoder).bad_rows
    assert "3 response(s)" in bad.reason


def test_a_missing_file_is_named(encoder, tmp_path):
    with pytest.raises(DataFileError, match=r"missing.jsonl: no such file"):
        load_pairs(tmp_path / "missing.jsonl", encoder)


def test_json_and_jsonl_give_the_same_pairs(encoder, tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps(toy_rows(3)))
    first = load_pairs(tmp_path / "pairs.json", encoder).dataset
    second = load_pairs(write_rows(tmp_path / "pairs.jsonl", toy_rows(3)), encoder).dataset
    assert list(first) == list(second)
