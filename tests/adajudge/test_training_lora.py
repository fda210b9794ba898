"""LoRA: what is trained, and that saving, loading and merging keep head and rewards."""

import json
import shutil

import pytest
import torch
from adajudge import AdaJudgeForSequenceClassification
from adajudge.data import ConversationEncoder, EncodedPair, PairCollator
from adajudge.training import add_lora, load_judge
from safetensors.torch import load_file, save_file

from tests.adajudge.chat_templates.families import family_tokenizer
from tests.adajudge.toy_training import (
    logged,
    save_backbone,
    single_thread,  # noqa: F401 (a fixture)
    toy_judge,
    toy_rows,
    toy_trainer,
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def trained(backbone, tmp_path_factory):
    """A trainer whose adapter is saved in its folder."""
    folder = tmp_path_factory.mktemp("run")
    trainer = toy_trainer(
        add_lora(toy_judge(backbone), r=4), folder, toy_rows(), max_steps=16, learning_rate=1e-2
    )
    trainer.train()
    trainer.save_model()
    return trainer


def rewards(model):
    encoder = ConversationEncoder(family_tokenizer("qwen3"))
    pairs = []
    for row in toy_rows(8):
        prompt = [{"role": "user", "content": row["prompt"]}]
        pairs.append(
            EncodedPair(encoder.encode(prompt, row["chosen"]), encoder.encode(prompt, row["rejected"]))
        )
    batch = PairCollator(0)(pairs)
    batch.pop("pair_weight")
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


def test_the_head_and_the_matrices_are_trained_and_nothing_else(backbone):
    model = add_lora(toy_judge(backbone), r=4)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {name for name in trainable if ".head.modules_to_save." in name}
    matrices = {name for name in trainable if ".backbone." in name and ".lora_" in name}
    assert trainable == heads | matrices
    assert len(heads) == len(toy_judge(backbone).head.state_dict())
    assert len(matrices) == 2 * 7 * 2  # two matrices for each of seven linear layers, two layers


def test_named_modules_only(backbone):
    model = add_lora(toy_judge(backbone), target_modules=["q_proj", "v_proj"])
    adapted = {
        name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name
    }
    assert adapted == {"q_proj", "v_proj"}


def test_an_unknown_module_is_named(backbone):
    with pytest.raises(ValueError, match=r"lora_target_modules: query came; .* q_proj"):
        add_lora(toy_judge(backbone), target_modules=["q_proj", "query"])


def test_it_learns(trained):
    assert logged(trained)[16] < 0.1 * logged(trained)[1]


def test_loading_an_adapter_keeps_head_and_rewards(trained):
    loaded = load_judge(trained.args.output_dir)
    assert type(loaded) is AdaJudgeForSequenceClassification
    head = trained.model.get_base_model().head.modules_to_save["default"].state_dict()
    for name, value in loaded.head.state_dict().items():
        assert torch.equal(value, head[name]), name
    torch.testing.assert_close(rewards(loaded), rewards(trained.model), atol=1e-4, rtol=1e-4)
    assert loaded.config.turn_boundary == trained.model.config.turn_boundary


def test_the_matrices_matter(trained, backbone):
    """Else the test above would prove nothing of them."""
    loaded = load_judge(trained.args.output_dir)
    plain = toy_judge(backbone)
    plain.head.load_state_dict(loaded.head.state_dict())
    assert (rewards(plain) - rewards(loaded)).abs().max() > 1e-2


def test_a_merged_judge_is_saved_whole(trained, tmp_path):
    merged = load_judge(trained.args.output_dir)
    merged.save_pretrained(tmp_path)
    loaded = AdaJudgeForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(rewards(loaded), rewards(merged))


def test_an_adapter_without_its_head_is_refused(trained, tmp_path):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "view_in_weight" not in name},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=r"no head weights experts.view_in_weight"):
        load_judge(folder)


@pytest.mark.parametrize("merged_first", [True, False], ids=["of-a-judge", "of-an-adapter"])
def test_an_adapter_on_what_was_trained_before(trained, tmp_path, merged_first):
    """Training goes on: the second adapter needs the first one's result, not the bare backbone with a new head."""
    before = trained.args.output_dir
    if merged_first:
        before = tmp_path / "judge"
        load_judge(trained.args.output_dir).save_pretrained(before)
    trainer = toy_trainer(add_lora(load_judge(before), r=4), tmp_path / "run", toy_rows(), max_steps=2)
    trainer.train()
    trainer.save_model()
    torch.testing.assert_close(
        rewards(load_judge(tmp_path / "run")), rewards(trainer.model), atol=1e-4, rtol=1e-4
    )


def test_an_adapter_whose_backbone_is_gone_says_so(trained, tmp_path):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"the adapter was trained on .*gone, which cannot be loaded"):
        load_judge(folder)


def test_other_weights_under_an_adapter_are_refused(trained, tmp_path):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = save_backbone(tmp_path / "another", seed=1)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"trained on other weights than .*another has now.* config.json"):
        load_judge(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"causal_refinement": False},
            "with causal_refinement True, but the config.json of .*judge has False now",
        ),
        ({"attention_tokens": "response"}, "with attention_tokens 'all', but .* has 'response' now"),
        ({"backbone_config": {"rms_norm_eps": 0.01}}, "with rms_norm_eps 1e-06, but .* has 0.01 now"),
    ],
    ids=["refinement", "pooling", "backbone"],
)
def test_another_configuration_under_an_adapter_is_refused(trained, tmp_path, change, message):
    """Its weights are the same, and would compute something else."""
    judge = tmp_path / "judge"
    load_judge(trained.args.output_dir).save_pretrained(judge)
    trainer = toy_trainer(add_lora(load_judge(judge), r=4), tmp_path / "run", toy_rows(), max_steps=1)
    trainer.train()
    trainer.save_model()
    load_judge(tmp_path / "run")
    config = json.loads((judge / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (judge / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_judge(tmp_path / "run")


@pytest.mark.parametrize("change", ["missing", "unknown", "none", "rank", "broken"])
def test_an_adapters_matrices_are_all_there(trained, tmp_path, change):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    one = next(name for name in weights if "lora_B" in name)
    if change == "missing":
        del weights[one]
    elif change == "unknown":
        weights[one.replace("layers.0", "layers.99")] = weights[one].clone()
    elif change == "none":
        weights = {name: x for name, x in weights.items() if "lora_" not in name}
    save_file(weights, path)
    message = "LoRA matrices came, expected the .* that its adapter_config.json says; missing or unknown: base_model"
    if change == "rank":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
        message = "its weights do not fit its adapter_config.json"
    elif change == "broken":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        message = "its weights cannot be read, the file is broken"
    with pytest.raises(ValueError, match=message):
        load_judge(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"peft_type": "NONE"}'])
def test_a_broken_adapter_configuration_is_named(trained, tmp_path, text):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"adapter: (adapter_config.json cannot be read|.* does not say which)"
    ):
        load_judge(folder)


def test_a_dtype_that_torch_does_not_know_is_named(trained, tmp_path):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    config["adapter_base"]["dtype"] = "half a byte"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"adapter: adapter_base in its config.json: dtype 'half a byte' came"
    ):
        load_judge(folder)


def test_an_adapter_of_a_changed_adapter_is_refused(trained, tmp_path):
    first = shutil.copytree(trained.args.output_dir, tmp_path / "first")
    trainer = toy_trainer(add_lora(load_judge(first), r=4), tmp_path / "second", toy_rows(), max_steps=1)
    trainer.train()
    trainer.save_model()
    load_judge(tmp_path / "second")
    weights = load_file(first / "adapter_model.safetensors")
    changed = next(name for name in weights if "lora_B" in name)
    save_file(weights | {changed: weights[changed] * 1.5}, first / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"second: the adapter was trained on other weights than .*first has now"
    ):
        load_judge(tmp_path / "second")


@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_meets_its_weights_in_the_dtype_of_its_training(backbone, tmp_path, trained_in, wanted):
    model = add_lora(toy_judge(backbone, dtype=trained_in), r=4)
    trainer = toy_trainer(model, tmp_path, toy_rows(), max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    loaded = load_judge(tmp_path, dtype=wanted)
    loaded.save_pretrained(tmp_path / "merged")
    again = AdaJudgeForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == again.dtype == (wanted or trained_in)
    name = "layers.0.input_layernorm.weight"  # has no matrices
    saved = toy_judge(backbone, dtype=trained_in).backbone.get_parameter(name)
    assert torch.equal(loaded.backbone.get_parameter(name), saved.to(loaded.dtype))
    expected = rewards(trainer.model)
    wide = wanted == torch.float32 or loaded.dtype == trained_in == torch.float32
    error = (rewards(loaded) - expected).abs().max()
    assert error < (1e-4 if wide and trained_in == torch.float32 else 0.05) * max(1.0, expected.abs().max())


def test_a_head_option_that_differs_from_the_judges_is_refused(trained):
    with pytest.raises(ValueError, match=r"num_blocks: 3 came, but the judge .* has 1"):
        load_judge(trained.args.output_dir, num_blocks=3)
