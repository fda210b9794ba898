"""The attention "adajudge": scores and gradients of any layout are those of transformers' own attention one by one."""

import subprocess
import sys

import pytest
import torch
from adajudge import AdaJudgeForSequenceClassification, backbone_attention
from adajudge.backbone_attention import layout_attention
from transformers import AttentionInterface, AutoModel, Gemma2Config

from adajudge_kernels import SequenceLayout
from tests.adajudge.judges import (
    BACKBONES,
    BATCH,
    LONGEST,
    flat_inputs,
    inputs,
    one_by_one,
    padded_inputs,
    random_judge,
    token_ids,
    wide_backbone,
)
from tests.kernels.batches import LAYOUTS

TOLERANCE = 1e-5
WEIGHTS = torch.arange(1.0, 7.0)  # so that the sequences' gradients differ


def wide_judge(family, attention="adajudge", **options):
    return random_judge(family, attention, wide_backbone(family), **options)


def rewards_and_gradients(model, rewards):
    model.zero_grad()
    (rewards * WEIGHTS[: len(rewards)]).sum().backward()
    return rewards.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=BACKBONES)
def family(request):
    return request.param


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def alone(request, family):
    """Rewards and gradients one by one, with transformers' own attention."""
    model = wide_judge(family, request.param)
    return rewards_and_gradients(model, one_by_one(model, token_ids()))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rewards_and_every_gradient_are_those_of_one_by_one(family, alone, kind):
    model = wide_judge(family)
    rewards, gradients = rewards_and_gradients(model, model(**inputs(token_ids(), kind)).logits[:, 0])
    expected_rewards, expected = alone
    assert torch.allclose(rewards, expected_rewards, atol=TOLERANCE, rtol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert torch.allclose(gradients[name] / scale, gradient / scale, atol=TOLERANCE, rtol=0), name


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral"])
def test_bf16_is_as_exact_as_sdpa_one_by_one(family, kind):
    """Measured from the same rounded weights in fp32: at most twice sdpa's error, or one rounding of the result."""

    def run(attention, dtype, kind=None):
        model = wide_judge(family, attention)
        model.backbone.to(torch.bfloat16).to(dtype)
        ids = token_ids()
        rewards = one_by_one(model, ids) if kind is None else model(**inputs(ids, kind)).logits[:, 0]
        rewards, gradients = rewards_and_gradients(model, rewards)
        return {"rewards": rewards} | {name: x.float() for name, x in gradients.items()}

    exact, sdpa = run("sdpa", torch.float32), run("sdpa", torch.bfloat16)
    for name, x in run("adajudge", torch.bfloat16, kind).items():
        allowed = 2 * (sdpa[name] - exact[name]).norm() + 2**-8 * exact[name].norm()
        assert (x - exact[name]).norm() <= allowed, name


@pytest.mark.parametrize("kind", ["shared", "padded_left"])
def test_autocast_serves_fp32_weights(kind):
    """Rotated queries and keys come in fp32 then, and values in bf16."""
    model = wide_judge("qwen3")
    batch = inputs(token_ids(), kind)
    expected = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        rewards = model(**batch).logits
    rewards.sum().backward()
    assert torch.allclose(rewards, expected, atol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture
def seen(monkeypatch):
    """What each layer's call of the attention was given: query shape and mask."""
    calls = []

    def spy(module, query, key, value, attention_mask, **options):
        calls.append((tuple(query.shape), attention_mask))
        return layout_attention(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, backbone_attention.NAME, spy)
    return calls


@pytest.mark.parametrize(("kind", "tokens"), [("shared", 36), ("packed", 50), ("padded_left", 36)])
def test_a_prompt_is_computed_once_padding_never_and_no_mask_is_built(seen, kind, tokens):
    model = wide_judge("qwen3")
    model(**inputs(token_ids(), kind))
    assert seen == [((1, 4, tokens, 8), None)] * 3


def test_equal_prompts_of_a_padded_batch_are_computed_once_wherever_they_stand(seen):
    """As a Trainer passes pairs: all chosen sides, then all rejected ones."""
    model, other = wide_judge("qwen3"), wide_judge("qwen3", "sdpa")
    prompts = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8]]
    rows = [prompts[i % 3] + [20 + i] * (1 + i) for i in range(6)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    attention = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    response = attention.clone()
    for i in range(6):
        response[i, : len(prompts[i % 3])] = 0
    batch = {"input_ids": ids, "attention_mask": attention, "response_mask": response}
    results = [rewards_and_gradients(judge, judge(**batch).logits[:, 0]) for judge in (model, other)]
    assert seen[0][0][2] == 4 + 2 + sum(range(1, 7))
    (rewards, gradients), (expected, true_gradients) = results
    assert torch.allclose(rewards, expected, atol=1e-5)
    assert len(set(rewards.tolist())) == 6
    for name, x in true_gradients.items():
        assert torch.allclose(gradients[name], x, atol=1e-5 * max(1.0, float(x.abs().max()))), name


@pytest.mark.parametrize("reason", ["several turns", "positions", "embeddings", "bidirectional"])
def test_prompts_are_not_shared_where_they_may_differ(seen, reason):
    model = wide_judge("qwen3", causal_refinement=reason != "bidirectional")
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 4, 3]])
    response = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": response}
    if reason == "several turns":
        response[:, 1] = 1
    if reason == "positions":
        batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    if reason == "embeddings":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    model(**batch)
    assert seen[0][0][2] == 10


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(seen):
    results = []
    for recompute in (False, True):
        model = wide_judge("qwen3").train()
        if recompute:
            model.gradient_checkpointing_enable()
        seen.clear()
        results.append(rewards_and_gradients(model, model(**flat_inputs(token_ids(), "shared")).logits[:, 0]))
        assert len(seen) == (6 if recompute else 3)
    (rewards, gradients), (again, recomputed) = results
    assert torch.equal(again, rewards)
    assert all(torch.equal(recomputed[name], x) for name, x in gradients.items())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_other_tokens_in_one_candidate_change_no_other_reward(kind):
    model, ids = wide_judge("qwen3"), token_ids()
    other = ids.clone()
    response = BATCH.sequences[3].rows[9:]
    other[response] = 1 + other[response] % 63
    with torch.no_grad():
        rewards, changed = (model(**inputs(x, kind)).logits[:, 0] for x in (ids, other))
    same = torch.tensor([True, True, True, False, True])
    assert torch.equal(changed[same], rewards[same])
    assert (changed[3] - rewards[3]).abs() > 100 * TOLERANCE


# Saving and loading


def test_the_implementation_is_chosen_at_loading_and_not_saved(tmp_path):
    batch = flat_inputs(token_ids(), "shared")
    for saved_with, loaded_with in (("adajudge", None), ("adajudge", "eager"), ("sdpa", "adajudge")):
        judge = random_judge(attn_implementation=saved_with)
        judge.save_pretrained(tmp_path)
        options = {} if loaded_with is None else {"attn_implementation": loaded_with}
        loaded = AdaJudgeForSequenceClassification.from_pretrained(tmp_path, **options).eval()
        assert loaded.backbone.config._attn_implementation == (loaded_with or "sdpa")
        with torch.no_grad():
            assert torch.allclose(loaded(**batch).logits, judge(**batch).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("loaded", [False, True])
def test_from_backbone_takes_the_implementation(loaded, tmp_path, seen):
    random_judge().backbone.save_pretrained(tmp_path)
    options = {"attn_implementation": "adajudge"}
    if loaded:
        backbone, options = AutoModel.from_pretrained(tmp_path, **options), {}
    else:
        backbone = tmp_path
    judge = AdaJudgeForSequenceClassification.from_backbone(backbone, num_blocks=1, **options).eval()
    with torch.no_grad():
        judge(**flat_inputs(token_ids(), "shared"))
        assert len(seen) == 3
        judge.set_attn_implementation("sdpa")
        judge(**flat_inputs(token_ids(), "shared"))
        assert len(seen) == 3


def test_where_adajudge_was_never_imported_transformers_says_so(tmp_path):
    random_judge().backbone.save_pretrained(tmp_path)
    code = (
        "import sys\nfrom transformers import AutoModel\n"
        "try: AutoModel.from_pretrained(sys.argv[1], attn_implementation='adajudge')\n"
        "except ValueError as error: assert 'attn_implementation=\"adajudge\"` is not supported' in str(error)\n"
        "else: raise AssertionError('it was loaded')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# Refusals


def test_a_backbone_on_its_own_is_told_what_to_do():
    model, batch = random_judge(attn_implementation="adajudge"), flat_inputs(token_ids(), "shared")
    with pytest.raises(
        ValueError, match=r"no layout came.*adajudge_layout=layout.*another attn_implementation"
    ):
        model.backbone(batch["input_ids"])
    layout = batch["layout"]
    positions = layout.position_ids()[None]
    states = model.backbone(
        batch["input_ids"], position_ids=positions, adajudge_layout=layout, use_cache=False
    ).last_hidden_state
    assert torch.equal(model.head(states[0], layout).reward, model(**batch).logits[:, 0])
    with pytest.raises(ValueError, match="Qwen3Attention wants: an attention mask"):
        model.backbone(
            batch["input_ids"], torch.ones_like(positions), positions, adajudge_layout=layout, use_cache=False
        )


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_window_shorter_than_a_sequence_is_refused(family, kind):
    model = random_judge(family, "adajudge")
    with pytest.raises(ValueError, match=rf"a sliding window of \d tokens, .* {LONGEST}\. .*sdpa"):
        model(**inputs(token_ids(), kind))


def test_soft_capping_is_refused():
    small = wide_backbone("qwen3")
    sizes = {
        name: getattr(small, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")
    }
    backbone = Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=LONGEST)
    model = random_judge(attn_implementation="adajudge", backbone=backbone)
    with pytest.raises(ValueError, match="Gemma2Attention wants: soft-capped scores"):
        model(**flat_inputs(token_ids(), "shared"))


def test_dropout_is_refused_in_training_only():
    backbone = wide_backbone("qwen3")
    backbone.attention_dropout = 0.1
    model, batch = random_judge("qwen3", "adajudge", backbone), flat_inputs(token_ids(), "shared")
    assert model(**batch).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"Qwen3Attention wants: dropout 0\.1"):
        model.train()(**batch)


def test_a_backbone_that_would_mix_sequences_is_refused_padded_too():
    model = random_judge(attn_implementation="adajudge")
    model.backbone.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(ValueError, match=r"layers of type chunked_attention.*any but 'adajudge'"):
        model(**padded_inputs(token_ids(), "padded_left"))


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"is_causal": False}, 8, "bidirectional attention"),
        ({"s_aux": torch.zeros(2)}, 8, "attention sinks"),
        ({"position_bias": torch.zeros(5, 5)}, 8, "a position bias"),
        ({}, 257, "heads of 257 features, more than 256"),
    ],
)
def test_what_a_layer_wants_and_cannot_have_is_named(options, size, message):
    layout = SequenceLayout.packed([2], [3])
    states = torch.zeros(1, 2, 5, size)
    with pytest.raises(ValueError, match=rf"Module wants: {message}.*Expected another attn_implementation"):
        layout_attention(torch.nn.Module(), states, states, states, None, adajudge_layout=layout, **options)


def test_several_rows_and_other_value_sizes_are_refused():
    layout = SequenceLayout.packed([2], [3])
    states = torch.zeros(2, 2, 5, 8)
    with pytest.raises(ValueError, match="a batch of several rows; values of another head size"):
        layout_attention(torch.nn.Module(), states, states, states[..., :4], None, adajudge_layout=layout)


def test_a_layer_that_is_not_causal_is_refused():
    layer, states = torch.nn.Module(), torch.zeros(1, 2, 5, 8)
    layer.is_causal = False
    with pytest.raises(ValueError, match="bidirectional attention"):
        layout_attention(layer, states, states, states, None, adajudge_layout=SequenceLayout.packed([2], [3]))


@pytest.mark.parametrize("kind", ["shared", "padded_left"])
def test_a_window_that_only_the_mask_knows_is_refused(kind):
    """Some decoders tell their attention layers nothing of it."""
    from transformers import PhimoeConfig

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "pad_token_id": 0,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    for window, refused in ((3, True), (LONGEST, False)):
        judge = random_judge("phimoe", "adajudge", PhimoeConfig(**sizes, **heads, sliding_window=window))
        if refused:
            with pytest.raises(
                ValueError, match="'phimoe': a sliding window of 3 tokens, shorter than a sequence"
            ):
                judge(**inputs(token_ids(), kind))
        else:
            judge(**inputs(token_ids(), kind))


def test_token_types_are_refused():
    batch = inputs(token_ids(), "padded_left")
    with pytest.raises(ValueError, match="token_type_ids came"):
        wide_judge("qwen3")(**batch, token_type_ids=torch.zeros_like(batch["input_ids"]))
