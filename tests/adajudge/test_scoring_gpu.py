"""Scoring on a GPU: the CPU's scores, and no waiting for the device within a pack."""

import copy
import warnings

import pytest
import torch
from adajudge.data import EncodedRow
from adajudge.scoring import Engine
from adajudge.scoring.packing import shared_packs

from adajudge_kernels import SequenceLayout
from tests.adajudge.judges import BACKBONES, random_judge
from tests.adajudge.test_scoring_engine import alone, encoded, rewards_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("attention", ["sdpa", "adajudge"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3"])
def test_scores_are_those_of_the_cpu(family, attention):
    rows = encoded()
    engine = Engine(random_judge(family, attention).to("cuda"), 40)
    assert rewards_of(engine.score(rows)) == pytest.approx(alone(random_judge(family), rows), abs=1e-4)


def test_a_compiled_backbone_gives_the_same_scores():
    rows = encoded()
    engine = Engine(random_judge("qwen3", "adajudge").to("cuda"), compile_backbone=True)
    assert rewards_of(engine.score(rows)) == pytest.approx(alone(random_judge(), rows), abs=1e-4)


@pytest.fixture
def little_memory():
    """64 MiB are left to this process, besides what matrix products take for themselves."""
    x = torch.randn(64, 64, device="cuda")
    torch.nn.functional.linear(x, x, x[0])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_sequence_that_does_not_fit_is_an_error_and_the_others_are_scored(little_memory):
    backbone = BACKBONES["qwen3"]()
    backbone.max_position_embeddings = 1 << 20
    rows = [EncodedRow([1] * n, n - 1) for n in (5, 100_000, 7)]  # a state of the second has 12 MiB
    engine = Engine(random_judge(backbone=backbone, attn_implementation="adajudge").to("cuda"), 200_000)
    first, large, last = engine.score(rows)
    expected = alone(random_judge(backbone=backbone), [rows[0], rows[2]])
    assert rewards_of([first, last]) == pytest.approx(expected, abs=1e-4)
    assert str(large) == "the device has no room for its 100000 tokens"
    assert engine.token_budget < 200_000


def test_the_backbone_is_read_without_waiting_for_the_device():
    """As many waits with six layers as with two: none of them is a layer's."""

    def waits(layers):
        backbone = copy.deepcopy(BACKBONES["qwen3"]())
        backbone.num_hidden_layers = layers
        backbone.layer_types = ["full_attention"] * layers
        model = random_judge(backbone=backbone, attn_implementation="adajudge").to("cuda")
        rows = encoded()
        (pack,) = shared_packs(rows, range(len(rows)), 4096)
        prompts = [rows[group[0]].prompt_length for group in pack.groups]
        responses = [[rows[i].response_length for i in group] for group in pack.groups]
        layout = SequenceLayout.shared_prompts(prompts, responses, "cuda")
        ids = torch.ones(layout.num_tokens, dtype=torch.long, device="cuda")
        with torch.inference_mode():
            model(ids, layout=layout)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    model(ids, layout=layout)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in found)

    assert waits(6) == waits(2)
