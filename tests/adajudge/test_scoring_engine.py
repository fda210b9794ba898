"""Engine: packs, ways of reading, and one score however it is asked."""

import random

import pytest
import torch
from adajudge.data import EncodedRow
from adajudge.scoring import Engine, ScoringError
from adajudge.scoring.packing import packed_packs, padded_packs, shared_packs
from adajudge.scoring.reading import Reading, choose_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config

from adajudge_kernels import SequenceLayout
from tests.adajudge.judges import BACKBONES, SMALL, random_judge
from tests.adajudge.test_modeling_refusals import longrope_judge

LENGTHS = [(12, 3), (12, 9), (3, 1), (12, 4), (0, 5), (20, 2), (3, 8), (12, 1), (1, 6)]  # prompt, response


def encoded(lengths=LENGTHS, vocabulary=64):
    """Sequences; those whose prompts are equally long have the same prompt."""
    generator = random.Random(0)
    prompts = {
        n: [generator.randrange(1, vocabulary) for _ in range(n)] for n in sorted({n for n, _ in lengths})
    }
    return [
        EncodedRow(prompts[n] + [generator.randrange(1, vocabulary) for _ in range(m)], n) for n, m in lengths
    ]


def alone(model, rows):
    """Rewards in fp64, every sequence in a call of its own."""
    rewards = []
    for row in rows:
        layout = SequenceLayout.packed([row.prompt_length], [row.response_length])
        ids = torch.tensor(row.input_ids)
        rewards.append(model.double()(ids, layout=layout).logits.item())
    return rewards


def rewards_of(results):
    return [score.reward for score in results]


lengths_of_rows = st.lists(st.tuples(st.sampled_from([0, 1, 5, 30]), st.integers(1, 40)), max_size=30)


@pytest.mark.parametrize("packer", [shared_packs, packed_packs, padded_packs])
@given(lengths=lengths_of_rows, budget=st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_packs_hold_every_sequence_once_within_the_budget(packer, lengths, budget):
    rows = encoded(lengths)
    packs = packer(rows, range(len(rows)), budget)
    assert sorted(index for pack in packs for index in pack.sequences) == list(range(len(rows)))
    for pack in packs:
        assert pack.tokens <= budget or len(pack.sequences) == 1
        prompts = [rows[group[0]].prompt_ids for group in pack.groups]
        assert all(
            rows[i].prompt_ids == prompt
            for group, prompt in zip(pack.groups, prompts, strict=True)
            for i in group
        )
        responses = sum(rows[i].response_length for i in pack.sequences)
        if packer is padded_packs:
            assert pack.tokens == len(pack.sequences) * max(len(rows[i]) for i in pack.sequences)
        else:
            assert pack.tokens == sum(map(len, prompts)) + responses


def test_a_prompt_is_laid_down_once_if_there_is_room():
    rows = encoded([(50, 10)] * 8 + [(7, 3)] * 2)
    (pack,) = shared_packs(rows, range(10), 1000)
    assert pack.groups == (tuple(range(8)), (8, 9))
    assert pack.tokens == 50 + 80 + 7 + 6
    divided = shared_packs(rows, range(8), 100)
    assert [len(pack.sequences) for pack in divided] == [5, 3]


CASES = [(family, attention) for family in BACKBONES for attention in ("sdpa", "eager", "adajudge")]


@pytest.mark.parametrize("budget", [1, 40, 4096])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_scores_are_those_of_one_by_one(family, attention, budget):
    """Windows of Gemma 3 and Mistral are shorter than most of these sequences."""
    rows = encoded()
    results = Engine(random_judge(family, attention), budget).score(rows)
    assert rewards_of(results) == pytest.approx(alone(random_judge(family), rows), abs=1e-4)
    assert [(s.prompt_tokens, s.response_tokens) for s in results] == LENGTHS
    assert all(sum(s.view_weights) == pytest.approx(1) and len(s.depth_weights) == 2 for s in results)


def test_every_way_is_taken_where_it_serves():
    def ways(model, rows):
        return {way.name: sorted(chosen) for way, chosen in Reading(model).divide(rows)}

    rows = encoded()
    everything = list(range(len(rows)))
    assert ways(random_judge("qwen3", "adajudge"), rows) == {"shared": everything}
    assert ways(random_judge("qwen3", "adajudge", causal_refinement=False), rows) == {"packed": everything}
    short = [i for i, row in enumerate(rows) if len(row) <= 7]
    divided = ways(random_judge("mistral", "adajudge"), rows)
    assert divided["shared"] == short
    assert divided["tree"] == [0, 1, 3, 7]
    assert ways(random_judge("qwen3", "sdpa"), rows).keys() == {"tree", "padded"}


def test_a_judge_that_is_not_causal_is_scored_too():
    rows = encoded()
    engine = Engine(random_judge("qwen3", "adajudge", causal_refinement=False))
    expected = alone(random_judge("qwen3", causal_refinement=False), rows)
    assert rewards_of(engine.score(rows)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "adajudge"])
def test_sequences_on_both_sides_of_longropes_border_are_read_apart(attention):
    rows = encoded()
    assert {len(row) > 8 for row in rows} == {True, False}
    results = Engine(longrope_judge(attention)).score(rows)
    assert rewards_of(results) == pytest.approx(alone(longrope_judge(), rows), abs=1e-4)


def test_attention_is_chosen_by_what_the_backbone_wants():
    gemma2 = Gemma2Config(**SMALL, head_dim=8)
    qwen, gemma = random_judge(), random_judge("gemma2", "eager", gemma2)
    for model in (qwen, gemma):
        choose_attention(model)
    assert Reading(qwen).attention == "adajudge"
    assert Reading(gemma).attention == "eager"  # its scores are soft-capped
    rows = encoded()
    expected = alone(random_judge("gemma2", "eager", gemma2), rows)
    assert rewards_of(Engine(gemma).score(rows)) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def little_room(monkeypatch):
    """A judge whose device has room for so many tokens at once."""

    def build(room, error):
        model = random_judge("qwen3", "adajudge")
        forward = model.forward

        def limited(input_ids, **options):
            if input_ids.numel() > room:
                raise error
            return forward(input_ids, **options)

        monkeypatch.setattr(model, "forward", limited)
        return model

    return build


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    MemoryError("std::bad_alloc"),  # of a compiled kernel
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cublas", "triton", "cpu", "compiled"])
def test_where_there_is_no_room_the_budget_is_halved(little_room, error, caplog):
    rows = encoded()
    engine = Engine(little_room(30, error), 100)
    assert rewards_of(engine.score(rows)) == pytest.approx(alone(random_judge(), rows), abs=1e-4)
    assert (engine.asked_budget, engine.token_budget) == (100, 25)
    assert f"token_budget is now {engine.token_budget}" in caplog.text
    assert engine.tokens_scored == sum(map(len, rows))


def test_a_sequence_without_room_is_an_error_and_the_others_are_scored(little_room):
    rows = encoded([*LENGTHS, (40, 5)])
    *scored, failed = Engine(little_room(30, OUT_OF_MEMORY[0])).score(rows)
    assert isinstance(failed, ScoringError)
    assert str(failed) == "the device has no room for its 45 tokens"
    assert rewards_of(scored) == pytest.approx(alone(random_judge(), rows[:-1]), abs=1e-4)


def test_a_small_pack_without_room_does_not_make_the_budget_small(little_room):
    rows = encoded([(5, 3), (5, 2)])
    engine = Engine(little_room(8, OUT_OF_MEMORY[0]), 2048)
    assert rewards_of(engine.score(rows)) == pytest.approx(alone(random_judge(), rows), abs=1e-4)
    assert engine.token_budget == 2048


def test_the_budget_never_falls_below_a_64th(little_room):
    engine = Engine(little_room(1, OUT_OF_MEMORY[0]), 128)
    assert all(isinstance(result, ScoringError) for result in engine.score(encoded()))
    assert engine.token_budget >= 2


def test_other_failures_are_not_taken_for_a_lack_of_memory(little_room):
    with pytest.raises(RuntimeError, match="illegal"):
        Engine(little_room(0, RuntimeError("an illegal instruction"))).score(encoded())


def test_read_tokens_are_fewer_than_scored_ones_where_prompts_are_shared():
    rows = encoded([(50, 5)] * 4)
    engine = Engine(random_judge("qwen3", "adajudge"))
    engine.score(rows)
    assert (engine.tokens_scored, engine.tokens_read) == (220, 70)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "adajudge"])
def test_equal_sequences_have_equal_scores(attention):
    """To the last bit, or the two sides of a pair that say the same would not tie."""
    rows = encoded() * 2
    engine = Engine(random_judge("mistral", attention), 40)
    results = engine.score(rows)
    assert results[: len(rows) // 2] == results[len(rows) // 2 :]
    assert engine.tokens_scored == sum(map(len, rows))


def test_nothing_gives_nothing_and_impossible_budgets_are_refused():
    assert Engine(random_judge()).score([]) == []
    with pytest.raises(ValueError, match="token_budget: 0 came"):
        Engine(random_judge(), 0)


def test_bf16_scores_differ_between_ways_less_than_by_one_step_of_the_embeddings():
    """How far bf16 rewards lie apart is stated in docs/scoring.md: not beyond what one ULP of the input changes."""
    rows = encoded()
    model = random_judge("qwen3", "adajudge").bfloat16()
    model.head.float()
    found = [rewards_of(Engine(model, budget).score(rows)) for budget in (1, 40, 4096)]
    model.set_attn_implementation("sdpa")
    found.append(rewards_of(Engine(model).score(rows)))
    spread = torch.tensor(found).amax(0) - torch.tensor(found).amin(0)
    embedding = model.get_input_embeddings().weight
    before, moved = embedding.detach().clone(), []
    for seed in range(8):
        up = torch.rand(embedding.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
        away = torch.where(up, float("inf"), float("-inf")).to(before.dtype)
        embedding.data = torch.nextafter(before, away)
        moved.append(rewards_of(Engine(model).score(rows)))
    steps = torch.tensor(moved).amax(0) - torch.tensor(moved).amin(0)
    assert spread.max() > 0  # else nothing is tested
    assert (spread <= steps).all()


def test_the_readout_of_the_same_states_is_bit_equal_however_they_lie():
    """Pooling and experts do not depend on the batch to the last bit; the blocks' matrix products are torch's."""
    model = random_judge("qwen3", "adajudge")
    head, rows = model.head, encoded([(12, 3), (12, 9), (12, 4)])
    generator = torch.Generator().manual_seed(0)
    prompt, *responses = (torch.randn(n, 32, generator=generator) for n in (12, 3, 9, 4))
    weights = torch.softmax(torch.randn(3, 2, generator=generator), 1)

    def read(states, layout, chosen):
        views = head.pooling([states, states * 0.5], weights[chosen], layout)
        context = torch.zeros(len(chosen), 32)
        return head.experts(views, context)[0]

    shared = SequenceLayout.shared_prompts([12], [[row.response_length for row in rows]])
    together = read(torch.cat([prompt, *responses]), shared, [0, 1, 2])
    for index, response in enumerate(responses):
        layout = SequenceLayout.packed([12], [len(response)])
        single = read(torch.cat([prompt, response]), layout, [index])
        assert torch.equal(single, together[index : index + 1])


def test_a_compiled_backbone_gives_the_same_scores_and_is_not_compiled_for_every_pack():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backbone = BACKBONES["qwen3"]()
    backbone.num_hidden_layers = 1
    rows = encoded()
    engine = Engine(
        random_judge(backbone=backbone, attn_implementation="adajudge"), 45, compile_backbone=True
    )
    expected = alone(random_judge(backbone=backbone), rows)
    assert rewards_of(engine.score(rows)) == pytest.approx(expected, abs=1e-4)
    assert rewards_of(engine.score(rows[2:])) == pytest.approx(expected[2:], abs=1e-4)
    assert rewards_of(engine.score(rows[1::2])) == pytest.approx(expected[1::2], abs=1e-4)
    counters = torch._dynamo.utils.counters
    assert (
        1 <= counters["stats"]["unique_graphs"] <= 4
    )  # of seven packs; one sequence is compiled apart from several
    assert not counters["graph_break"]
