"""One score however a batch is laid out, for every backbone family; and the ways in which it could go wrong."""

import pytest
import torch
from adajudge.attention_masks import tree_mask

from tests.adajudge.judges import (
    BACKBONES,
    BATCH,
    SERVED,
    flat_inputs,
    inputs,
    one_by_one,
    padded_inputs,
    random_judge,
    token_ids,
)
from tests.kernels.batches import LAYOUTS

families = pytest.mark.parametrize("family", BACKBONES)
TOLERANCE = 1e-5


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("family", "attention"), SERVED)
def test_every_layout_scores_like_one_by_one(family, kind, attention):
    model, ids = random_judge(family, attention), token_ids()
    with torch.no_grad():
        rewards = model(**inputs(ids, kind)).logits[:, 0]
        assert torch.allclose(rewards, one_by_one(model, ids), atol=TOLERANCE, rtol=0)
        assert rewards.std() > 100 * TOLERANCE  # the sequences do differ


@families
def test_parameter_gradients_do_not_depend_on_the_layout(family):
    model, ids = random_judge(family), token_ids()
    gradients = []
    for kind in LAYOUTS:
        model.zero_grad()
        (model(**inputs(ids, kind)).logits[:, 0] * torch.arange(1.0, 6.0)).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            scale = gradient.abs().max() + 1e-3
            assert torch.allclose(other[name] / scale, gradient / scale, atol=1e-4), name


@pytest.mark.parametrize(
    "leak", [{"use_cache": True}, {"attention_mask": torch.ones(1, 50, dtype=torch.long)}]
)
def test_contamination_between_packed_sequences_would_be_seen(leak):
    """A backbone that keeps its cache on, or sees an all-ones mask, lets packed sequences read each other; the
    comparison above would fail by far."""
    model, ids = random_judge("qwen3"), token_ids()
    packed = flat_inputs(ids, "packed")
    layout = packed["layout"]
    with torch.no_grad():
        arguments = {"use_cache": False} | leak
        states = model.backbone(
            input_ids=packed["input_ids"], position_ids=layout.position_ids()[None], **arguments
        ).last_hidden_state
        wrong = model.head(states[0], layout).reward
        right = one_by_one(model, ids)
    assert (wrong - right).abs().max() > 100 * TOLERANCE


def test_a_callers_use_cache_is_ignored():
    model, ids = random_judge(), token_ids()
    packed = flat_inputs(ids, "packed")
    with torch.no_grad():
        assert torch.equal(model(**packed, use_cache=True).logits, model(**packed).logits)


@pytest.mark.parametrize("kind", ["padded_left", "padded_right"])
def test_what_stands_in_padding_does_not_matter(kind):
    model, ids = random_judge(), token_ids()
    batch = padded_inputs(ids, kind)
    other = batch | {"input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 63)}
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, model(**other).logits, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "adajudge"])
def test_left_padding_gives_finite_gradients(attention):
    model = random_judge(attn_implementation=attention)
    model(**padded_inputs(token_ids(), "padded_left")).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_tree_mask_shows_a_response_its_prompt_and_itself():
    layout, _ = BATCH.lay_out("shared")
    seen = tree_mask(layout)
    for sequence in BATCH.sequences:
        for i, row in enumerate(sequence.rows):
            if sequence.response[i]:
                assert seen[row].nonzero().squeeze(1).tolist() == sequence.rows[: i + 1]


def test_shared_prompts_are_refused_where_they_cannot_be_served():
    model, ids = random_judge(), token_ids()
    model.backbone.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"flex_attention.* cannot serve a prompt-shared"):
        model(**flat_inputs(ids, "shared"))
    bidirectional = random_judge(causal_refinement=False)
    with pytest.raises(ValueError, match="prompt-shared"):
        bidirectional(**flat_inputs(ids, "shared"))


def test_embeddings_may_come_instead_of_ids():
    model, ids = random_judge(), token_ids()
    with torch.no_grad():
        for kind in LAYOUTS:
            batch = inputs(ids, kind)
            expected = model(**batch).logits
            batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
            assert torch.equal(model(**batch).logits, expected)
