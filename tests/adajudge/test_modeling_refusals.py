"""What a judge must not do silently: read padding, mix sequences, draw weights anew, lose precision."""

import itertools
import subprocess
import sys

import pytest
import torch
from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification
from adajudge.attention_masks import flash_arguments
from adajudge.data import TurnBoundary
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma3TextConfig,
    Phi3Config,
    T5Config,
)

from adajudge_kernels import SequenceLayout
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

Judge = AdaJudgeForSequenceClassification
SMALL_HEAD = {"num_blocks": 2, "expert_hidden_size": 8, "router_hidden_size": 8}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products on two busy cores wait for each other's threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same_weights(left, right):
    return left.keys() == right.keys() and all(torch.equal(x, right[name]) for name, x in left.items())


# Padding


@pytest.mark.parametrize("kind", ["padded_left", "padded_right"])
@pytest.mark.parametrize(("family", "attention"), SERVED)
def test_nan_in_padding_reaches_no_reward_and_no_gradient(family, kind, attention):
    model = random_judge(family, attention)
    batch = padded_inputs(token_ids(), kind)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    results = []
    for filler in (0.0, float("nan")):
        padding = batch["attention_mask"][:, :, None] == 0
        embeds = torch.where(padding, filler, embeddings).requires_grad_()
        model.zero_grad()
        rewards = model(inputs_embeds=embeds, **batch).logits
        rewards.sum().backward()
        results.append([rewards, embeds.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))
    assert results[0][0].isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "adajudge"])
def test_the_pad_tokens_embedding_is_never_read(attention):
    model, ids = random_judge(attn_implementation=attention), token_ids()
    batch = padded_inputs(ids, "padded_left")
    expected = model(**batch).logits
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = float("nan")
    assert torch.equal(model(**batch).logits, expected)
    outside = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    assert torch.equal(model(**batch | {"input_ids": outside}).logits, expected)


@pytest.mark.parametrize("attention", ["sdpa", "adajudge"])
def test_given_positions_are_taken_and_those_of_padding_are_not(attention):
    model = random_judge(attn_implementation=attention)
    batch = padded_inputs(token_ids(), "padded_left")
    real = batch["attention_mask"]
    counted = (real.cumsum(1) - 1).masked_fill(real == 0, 1000)
    expected = model(**batch).logits
    # Without positions of their own, equal prompts are read once by our attention: the same up to rounding.
    rounding = 1e-5 if attention == "adajudge" else 0.0
    assert torch.allclose(model(**batch, position_ids=counted).logits, expected, atol=rounding, rtol=0)
    assert not torch.allclose(model(**batch, position_ids=counted * 2 * real).logits, expected, atol=1e-3)
    with pytest.raises(ValueError, match=r"a sequence of 67 tokens came, but .* end at 64"):
        model(**batch, position_ids=counted + 50)
    with pytest.raises(ValueError, match="position_ids: shape"):
        model(**batch, position_ids=counted[:1])


# Sequences that share a row


def longrope_judge(attention="sdpa"):
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "original_max_position_embeddings": 10,
        "rope_theta": 10000.0,
    }
    backbone = Phi3Config(
        **SIZES, max_position_embeddings=64, original_max_position_embeddings=10, rope_parameters=rope
    )
    torch.manual_seed(0)
    config = AdaJudgeConfig(backbone_config=backbone, **SMALL_HEAD)
    config._attn_implementation = attention
    model = Judge(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "adajudge"])
@pytest.mark.parametrize("kind", ["packed", "padded_left", "padded_right"])
def test_longrope_rewards_do_not_depend_on_longer_neighbours(kind, attention):
    """Sequences of 9, 6, 6, 17 and 12 tokens, on both sides of the 10 at which the rotation changes."""
    model, ids = longrope_judge(attention), token_ids()
    with torch.no_grad():
        alone = one_by_one(model, ids)
        assert torch.allclose(model(**inputs(ids, kind)).logits[:, 0], alone, atol=1e-5, rtol=0)
        model.set_attn_implementation("sdpa")
        layout, source = BATCH.lay_out("packed")
        states = model.backbone(
            ids[source][None], position_ids=layout.position_ids()[None], use_cache=False
        ).last_hidden_state
        assert (model.head(states[0], layout).reward - alone).abs().max() > 1e-3  # what would go wrong


def test_longrope_refuses_shared_prompts_on_both_sides_of_its_limit():
    with pytest.raises(ValueError, match="both sides of 10 tokens share prompts"):
        longrope_judge()(**flat_inputs(token_ids(), "shared"))


def judge_of(backbone):
    return Judge(AdaJudgeConfig(backbone_config=backbone, **SMALL_HEAD)).eval()


@pytest.mark.parametrize("kind", ["packed", "shared"])
@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        (lambda: Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True), "bidirectional"),
        (lambda: BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4), "takes no position_ids"),
    ],
)
def test_backbones_that_would_mix_sequences_serve_padded_batches_only(backbone, reason, kind):
    model = judge_of(backbone())
    assert model(**padded_inputs(token_ids(), "padded_right")).logits.isfinite().all()
    with pytest.raises(ValueError, match=rf"cannot serve sequences without padding.*{reason}"):
        model(**flat_inputs(token_ids(), kind))


def test_flash_attention_is_told_where_packed_sequences_lie(monkeypatch):
    model = random_judge("qwen3")
    layout, source = BATCH.lay_out("packed")
    seen = {}

    def backbone(**arguments):
        seen.update(arguments)
        return type("Output", (), {"last_hidden_state": torch.zeros(1, len(source), 32)})

    model.backbone.config._attn_implementation_internal = "flash_attention_2"
    monkeypatch.setattr(model.backbone, "forward", backbone)
    # The check reads the signature of forward, which the stand-in lacks.
    monkeypatch.setattr("adajudge.attention_masks.check_keeps_apart", lambda *_: None)
    model(input_ids=token_ids()[source], layout=layout)
    lengths = [len(sequence.rows) for sequence in BATCH.sequences]
    assert seen["cu_seq_lens_k"].tolist() == [0, *itertools.accumulate(lengths)]
    assert seen["cu_seq_lens_q"].tolist() == seen["cu_seq_lens_k"].tolist()
    assert seen["cu_seq_lens_q"].dtype == torch.int32
    assert seen["max_length_q"] == seen["max_length_k"] == max(lengths)
    assert seen["attention_mask"] is None
    assert seen["use_cache"] is False


def test_other_implementations_are_told_nothing():
    assert flash_arguments(random_judge().backbone.config, torch.tensor([3, 4])) == {}


def test_the_attention_implementation_can_be_changed():
    model, batch = random_judge("gemma3"), flat_inputs(token_ids(), "shared")
    expected = model(**batch).logits
    model.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5, rtol=0)


def test_a_cache_is_refused():
    with pytest.raises(ValueError, match="past_key_values came"):
        random_judge()(**padded_inputs(token_ids(), "padded_right"), past_key_values=object())


def test_a_padded_layout_is_refused():
    layout, source = BATCH.lay_out("padded_left")
    with pytest.raises(ValueError, match="layout: a padded one came"):
        random_judge()(input_ids=source[None], layout=layout)


@pytest.mark.parametrize("kind", ["packed", "shared"])
def test_a_flat_row_may_lack_its_batch_dimension(kind):
    model, batch = random_judge(), flat_inputs(token_ids(), kind)
    assert torch.equal(model(**batch).logits, model(batch["input_ids"][0], layout=batch["layout"]).logits)


def test_an_empty_batch_gives_no_rewards():
    model, nothing = random_judge(), torch.zeros(1, 0, dtype=torch.long)
    padded = model(torch.zeros(0, 5, dtype=torch.long), response_mask=torch.zeros(0, 5))
    assert padded.logits.shape == (0, 1)
    for layout in (SequenceLayout.packed([], []), SequenceLayout.shared_prompts([], [])):
        assert model(nothing, layout=layout).view_weights.shape == (0, 3)


# Weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved judge and its saved backbone."""
    folder = tmp_path_factory.mktemp("saved")
    judge = random_judge()
    judge.save_pretrained(folder / "judge")
    judge.backbone.save_pretrained(folder / "backbone")
    return folder


def test_a_loaded_backbone_is_taken_as_it_is(saved):
    backbone = AutoModel.from_pretrained(saved / "backbone", attn_implementation="eager")
    backbone.resize_token_embeddings(70, mean_resizing=False)  # a new module: not marked as initialised
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    judge = Judge.from_backbone(backbone, **SMALL_HEAD)
    assert judge.backbone is backbone
    assert same_weights(judge.backbone.state_dict(), before)
    assert judge.config.backbone_config is backbone.config
    assert backbone.config._attn_implementation == "eager"


def test_a_checkpoint_with_an_lm_head_serves_as_backbone(saved, tmp_path):
    model = AutoModelForCausalLM.from_config(BACKBONES["qwen3"]())
    model.save_pretrained(tmp_path)
    judge = Judge.from_backbone(tmp_path, **SMALL_HEAD)
    assert same_weights(judge.backbone.state_dict(), model.model.state_dict())
    with pytest.raises(ValueError, match="with an LM head came"):
        Judge.from_backbone(model)


def test_the_head_stays_fp32_on_a_backbone_of_low_precision(saved, tmp_path):
    judge = Judge.from_backbone(saved / "backbone", dtype=torch.bfloat16, **SMALL_HEAD)
    assert {p.dtype for p in judge.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in judge.head.parameters()} == {torch.float32}
    for parameter in judge.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    judge.eval().save_pretrained(tmp_path)
    again = Judge.from_pretrained(tmp_path).eval()
    assert same_weights(again.state_dict(), judge.state_dict())
    assert {p.dtype for p in again.head.parameters()} == {torch.float32}
    for kind in LAYOUTS:
        batch = inputs(token_ids(), kind)
        assert torch.equal(again(**batch).logits, judge(**batch).logits)


def test_a_resized_vocabulary_survives_saving(saved, tmp_path):
    judge = Judge.from_pretrained(saved / "judge")
    judge.resize_token_embeddings(80, mean_resizing=False)
    judge.save_pretrained(tmp_path)
    assert same_weights(Judge.from_pretrained(tmp_path).state_dict(), judge.state_dict())


def rewrite(folder, target, change):
    """A copy of a checkpoint whose weights `change` has edited in place."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_missing_weights_are_refused(saved, tmp_path):
    for part, name in (("judge", "backbone.norm.weight"), ("judge", "head.pooling.attention_bias")):
        broken = rewrite(saved / part, tmp_path, lambda weights, name=name: weights.pop(name))
        with pytest.raises(ValueError, match=rf"missing keys: {name}"):
            AutoModelForSequenceClassification.from_pretrained(broken)
    broken = rewrite(saved / "backbone", tmp_path, lambda weights: weights.pop("norm.weight"))
    with pytest.raises(ValueError, match=r"missing keys: norm\.weight"):
        Judge.from_backbone(broken)


def test_unknown_weights_are_refused(saved, tmp_path):
    broken = rewrite(saved / "judge", tmp_path, lambda weights: weights.update({"head.more": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unexpected keys: head\.more"):
        Judge.from_pretrained(broken)


def test_pickled_weights_are_refused(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved / "judge" / "config.json").read_text())
    torch.save(load_file(saved / "judge" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Judge.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors: False came"):
        Judge.from_pretrained(tmp_path, use_safetensors=False)


def test_remote_code_is_refused(saved):
    for load, part in ((Judge.from_pretrained, "judge"), (Judge.from_backbone, "backbone")):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(saved / part, trust_remote_code=True)


def test_a_judge_is_no_backbone(saved):
    with pytest.raises(ValueError, match=r"a judge is there.*use from_pretrained"):
        Judge.from_backbone(saved / "judge")


def test_an_unknown_option_is_refused(saved):
    with pytest.raises(TypeError, match="num_block"):
        Judge.from_backbone(saved / "backbone", num_block=2)
    backbone = AutoModel.from_pretrained(saved / "backbone")
    with pytest.raises(ValueError, match="attn_implementation, dtype: for loading"):
        Judge.from_backbone(backbone, dtype=torch.bfloat16, attn_implementation="eager")


def test_an_adapter_is_loaded_with_its_head(saved, tmp_path):
    judge = Judge.from_pretrained(saved / "judge")
    config = LoraConfig(target_modules=r"backbone\..*q_proj", modules_to_save=["head"], r=2)
    tuned = get_peft_model(judge, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(tmp_path)
    batch = padded_inputs(token_ids(), "padded_right")
    expected = tuned.eval()(**batch).logits
    assert torch.equal(
        AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()(**batch).logits, expected
    )
    assert torch.equal(
        PeftModel.from_pretrained(Judge.from_pretrained(saved / "judge"), tmp_path).eval()(**batch).logits,
        expected,
    )
    with pytest.raises(ValueError, match=r"an adapter is there.*load_judge"):
        Judge.from_pretrained(tmp_path)


def test_merging_an_adapter_keeps_the_trained_head(saved):
    judge = Judge.from_pretrained(saved / "judge")
    tuned = get_peft_model(
        judge, LoraConfig(target_modules=r"backbone\..*q_proj", modules_to_save=["head"], r=2)
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    trained = tuned.base_model.model.head.modules_to_save["default"].state_dict()
    head = {name: x.clone() for name, x in trained.items()}
    batch = padded_inputs(token_ids(), "padded_right")
    expected = tuned.eval()(**batch).logits
    merged = tuned.merge_and_unload()
    assert same_weights(merged.head.state_dict(), head)
    # The adapter itself is still zero: merging moves the backbone by nothing, and rewards are the same bits.
    assert torch.equal(merged.eval()(**batch).logits, expected)


def test_checkpointing_recomputes_backbone_and_head_blocks(saved):
    judge = Judge.from_pretrained(saved / "judge").train()
    judge.gradient_checkpointing_enable()
    calls = []
    for module in (judge.backbone.layers[0], judge.head.refinement.blocks[0]):
        module.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    judge(**padded_inputs(token_ids(), "padded_left")).logits.sum().backward()
    # A checkpointed decoder layer runs its own forward anew below its hooks; a block is called twice.
    assert calls.count("RefinementBlock") == 2
    assert judge.backbone.layers[0].gradient_checkpointing
    judge.gradient_checkpointing_disable()
    assert not judge.head.refinement.gradient_checkpointing


# Configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone_config": {"hidden_size": 4}}, "backbone_config: no model_type"),
        ({"backbone_config": T5Config()}, "is an encoder and a decoder"),
        ({"backbone_config": AdaJudgeConfig()}, "that of a judge came"),
        ({"num_labels": 2}, "num_labels: 2 came"),
        ({"problem_type": "single_label_classification"}, "problem_type"),
        ({"turn_boundary": {"assistant_header_ids": []}}, "assistant_header_ids"),
        ({"adapter_base": {"dtype": "bfloat16"}}, "adapter_base: .* expected dtype and digest"),
        ({"adapter_base": "bfloat16"}, "adapter_base: 'bfloat16' came, expected dtype and digest"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AdaJudgeConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_blocks": 9}, "num_blocks"),
        ({"block_num_heads": 5}, "num_heads: 5 came"),
        ({"attention_tokens": "prompt"}, "attention_tokens: 'prompt' came"),
        ({"backbone_config": None}, "backbone_config: None came"),
    ],
)
def test_a_head_that_cannot_be_built_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Judge(AdaJudgeConfig(**{"backbone_config": BACKBONES["qwen3"]()} | values))


def test_the_turn_boundary_survives_saving(tmp_path):
    boundary = TurnBoundary([50, 51], [9], [52], header_white_space=1)
    AdaJudgeConfig(backbone_config=BACKBONES["llama"](), turn_boundary=boundary).save_pretrained(tmp_path)
    loaded = AdaJudgeConfig.from_pretrained(tmp_path)
    assert TurnBoundary.from_dict(loaded.turn_boundary) == boundary
    assert loaded.backbone_config.model_type == "llama"
    assert loaded.hidden_size == 32


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, adajudge; assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "adajudge.AdaJudgeForSequenceClassification; adajudge.__version__\n"
        "from transformers import AutoConfig; AutoConfig.for_model('adajudge')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
