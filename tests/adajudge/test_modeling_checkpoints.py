"""Saving, loading, LoRA, gradient checkpointing, the Auto classes, and refusals."""

import json

import pytest
import torch
from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification
from adajudge.data import TurnBoundary
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.adajudge.judges import BACKBONES, inputs, padded_inputs, random_judge, token_ids

PADDED = padded_inputs(token_ids(), "padded_right")


def rewards(model):
    with torch.no_grad():
        return model.eval()(**PADDED).logits


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_equal(family, dtype, tmp_path):
    random_judge(family).save_pretrained(tmp_path / "fp32")
    model = AdaJudgeForSequenceClassification.from_pretrained(tmp_path / "fp32", dtype=dtype)
    model.save_pretrained(tmp_path / "again")
    loaded = AdaJudgeForSequenceClassification.from_pretrained(tmp_path / "again", dtype=dtype)
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(x, saved[name]) for name, x in loaded.state_dict().items())
    assert torch.equal(rewards(loaded), rewards(model))
    assert sorted(p.suffix for p in (tmp_path / "again").iterdir()) == [".json", ".safetensors"]


def test_auto_classes_know_the_judge(tmp_path):
    random_judge().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), AdaJudgeConfig)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(model, AdaJudgeForSequenceClassification)
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"


def test_from_backbone_takes_its_weights_and_a_new_head(tmp_path):
    judge = random_judge()
    judge.backbone.save_pretrained(tmp_path)
    model = AdaJudgeForSequenceClassification.from_backbone(
        tmp_path, num_blocks=1, attn_implementation="eager"
    )
    trained = judge.backbone.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in model.backbone.state_dict().items())
    assert len(model.head.refinement.blocks) == 1
    assert model.backbone.config._attn_implementation == "eager"


def test_from_backbone_never_builds_a_random_one(tmp_path, monkeypatch):
    random_judge().backbone.save_pretrained(tmp_path)
    from transformers import AutoModel

    def refuse(*args, **kwargs):
        raise AssertionError("a random backbone was built")

    monkeypatch.setattr(AutoModel, "from_config", refuse)
    AdaJudgeForSequenceClassification.from_backbone(tmp_path)


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    random_judge().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: x for name, x in load_file(path).items() if not name.startswith("head.experts")}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: head\.experts"):
        AdaJudgeForSequenceClassification.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    random_judge().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"expert_hidden_size": 9}
    path.write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=r"mismatch|view_in"):
        AdaJudgeForSequenceClassification.from_pretrained(tmp_path)


def test_a_bare_backbone_is_refused_with_the_way_out(tmp_path):
    random_judge().backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)qwen3.*from_backbone"):
        AdaJudgeForSequenceClassification.from_pretrained(tmp_path)


def lora_judge():
    config = LoraConfig(target_modules=r"backbone\..*(q_proj|v_proj)", modules_to_save=["head"], r=2)
    model = get_peft_model(random_judge(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:  # as if trained: adapters and head differ from their start
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_lora_saves_loads_and_merges_with_its_head(tmp_path):
    model = lora_judge()
    expected = rewards(model)
    assert (expected - rewards(random_judge())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(random_judge(), tmp_path / "adapter")
    assert torch.equal(rewards(loaded), expected)
    merged = loaded.merge_and_unload()
    assert torch.allclose(rewards(merged), expected, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(
        rewards(AdaJudgeForSequenceClassification.from_pretrained(tmp_path / "merged")), rewards(merged)
    )


def test_lora_trains_adapters_and_head_only():
    model = lora_judge()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "head.modules_to_save" in name for name in trained)
    assert any("experts" in name for name in trained)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = random_judge().train()
        if recompute:
            model.gradient_checkpointing_enable()
            assert model.head.refinement.gradient_checkpointing
        model(**PADDED).logits.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(g, gradients[1][name], atol=1e-6) for name, g in gradients[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_judges_answer_in_fp32(dtype):
    model = random_judge().to(dtype)
    out = model(**PADDED)
    assert {x.dtype for x in out.values()} == {torch.float32}
    assert {name: tuple(x.shape) for name, x in out.items()} == {
        "logits": (5, 1),
        "view_scores": (5, 3),
        "view_weights": (5, 3),
        "depth_weights": (5, 2),
    }


def test_the_response_is_found_behind_the_last_header():
    model, ids = random_judge(), token_ids()
    batch = {name: x[2:3] for name, x in padded_inputs(ids, "padded_right").items()}
    row = batch["input_ids"][0]
    row[:3] = torch.tensor([50, 51, 7])  # header 50 51, response from the third token on
    batch["response_mask"] = (batch["attention_mask"] * (torch.arange(row.numel()) >= 2)).long()
    explicit = model(**batch).logits
    del batch["response_mask"]
    with pytest.raises(ValueError, match="response_mask: none came"):
        model(**batch)
    model.config.turn_boundary = TurnBoundary([50, 51]).to_dict()
    assert torch.equal(model(**batch).logits, explicit)


def test_a_tuple_on_request():
    out = random_judge()(**PADDED, return_dict=False)
    assert isinstance(out, tuple)
    assert out[0].shape == (5, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(5)}, "labels came"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"attention_mask": torch.ones(5, 3)}, "response_mask: shape|attention_mask: shape"),
        ({"layout": inputs(token_ids(), "packed")["layout"]}, "layout came with a mask"),
    ],
)
def test_malformed_calls_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        random_judge()(**{**PADDED, **change})


def test_a_layout_of_other_tokens_is_refused():
    packed = inputs(token_ids(), "packed")
    with pytest.raises(ValueError, match=r"\(1, 49\) came, expected \[1, 50\]"):
        random_judge()(input_ids=packed["input_ids"][:, :-1], layout=packed["layout"])


def test_a_sequence_beyond_the_backbones_positions_is_refused():
    ids = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(ValueError, match="65 tokens came, but the backbone's positions end at 64"):
        random_judge()(ids, response_mask=torch.ones_like(ids))


def test_several_labels_are_refused():
    with pytest.raises(ValueError, match="num_labels: 3 came"):
        AdaJudgeConfig(backbone_config=BACKBONES["qwen3"](), num_labels=3)
