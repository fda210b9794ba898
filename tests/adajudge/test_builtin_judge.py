"""The built-in judge: its pipeline runs from nothing, and the shipped one keeps its card's word."""

import json
import math

import pytest
from adajudge import Scorer
from adajudge.builtin.build import JUDGE, QUICK, build
from adajudge.builtin.card import write_card
from adajudge.builtin.world import DOMAINS, rows
from adajudge.data import TurnBoundary, parse_row
from adajudge.scoring import BUILT_IN_JUDGE
from safetensors import safe_open

RESULTS = json.loads((BUILT_IN_JUDGE / "results.json").read_text())


def test_the_pipeline_runs_from_nothing(tmp_path):
    results = build(tmp_path, QUICK)
    assert set(results["test_accuracy"]) == set(RESULTS["test_accuracy"])
    assert len(results["runs"]) == 12
    scorer = Scorer.from_pretrained(tmp_path)
    assert math.isfinite(scorer.score_response("tell me about sport .", "the ball .").reward)
    with pytest.raises(ValueError, match="unknown to this judge"):
        scorer.score_response("Discuss Kant.", "He wrote three critiques.")
    assert "What the comparison shows" in (tmp_path / "README.md").read_text()


def test_the_shipped_judge_reaches_its_cards_accuracy_on_fresh_pairs():
    """150 pairs a domain of a seed of their own: within four standard errors of the shipped run's test accuracy."""
    shipped = next(run for run in RESULTS["runs"] if run["head"] == JUDGE)
    scorer = Scorer.from_pretrained()
    for domain in DOMAINS:
        fresh = [parse_row(row, line) for line, row in enumerate(rows(domain, "test", 150, 4242), 1)]
        accuracy = sum(result.margin > 0 for result in scorer.score(fresh)) / len(fresh)
        share = shipped["test"][domain]
        error = max(share * (1 - share), 0.01) ** 0.5
        assert (
            abs(accuracy - share)
            <= 4 * error * (1 / 150 + 1 / RESULTS["plan"]["evaluation_pairs_per_domain"]) ** 0.5
        )


def test_the_card_is_written_from_the_results(tmp_path):
    write_card(tmp_path / "README.md", RESULTS, JUDGE)
    assert (BUILT_IN_JUDGE / "README.md").read_text() == (tmp_path / "README.md").read_text()


def test_fp16_storage_costs_no_accuracy():
    assert abs(RESULTS["fp16"]["fp32"] - RESULTS["fp16"]["stored"]) < 0.005


def test_the_shipped_judge_is_small_safetensors_of_two_blocks():
    files = {path.name: path.stat().st_size for path in BUILT_IN_JUDGE.iterdir()}
    assert files["model.safetensors"] < 6_000_000
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    with safe_open(BUILT_IN_JUDGE / "model.safetensors", "pt") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"torch.float16"}  # noqa: SIM118
    assert json.loads((BUILT_IN_JUDGE / "config.json").read_text())["num_blocks"] == 2


def test_the_shipped_judge_finds_the_response_itself():
    scorer = Scorer.from_pretrained()
    boundary = TurnBoundary.from_dict(scorer.model.config.turn_boundary)
    assert boundary == scorer.encoder.boundary
