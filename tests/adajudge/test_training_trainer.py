"""The trainer: the loss it takes, what it measures, exact resumption, checkpoints that score at once."""

import json

import pytest
import torch
from adajudge.data import PairCollator
from adajudge.scoring import Scorer
from adajudge.training import add_lora

from adajudge_kernels import focal_bradley_terry_loss
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
    trainer = toy_trainer(
        toy_judge(backbone), tmp_path_factory.mktemp("run"), toy_rows(), max_steps=16, eval_strategy="steps",
        eval_steps=8,
    )  # fmt: skip
    trainer.train()
    return trainer


def collated(trainer, count=None):
    pairs = trainer.train_dataset
    return PairCollator(0)([pairs[i] for i in range(count or len(pairs))])


def test_the_loss_falls_on_a_separable_preference_set(trained):
    losses = list(logged(trained).values())
    assert sum(losses[-3:]) < 0.1 * sum(losses[:3])
    assert logged(trained, "accuracy")[16] == 1.0
    assert logged(trained, "margin")[16] > 1.0


def test_evaluation_measures_every_pair(trained):
    """32 pairs in batches of 8, against one plain forward over all of them."""
    entry = next(e for e in trained.state.log_history if e.get("step") == 16 and "eval_loss" in e)
    batch = collated(trained)
    weight = batch.pop("pair_weight")
    with torch.no_grad():
        out = trained.model.eval()(**batch)
    chosen, rejected = out.logits[:, 0].chunk(2)
    pi = out.view_weights
    loss = focal_bradley_terry_loss(chosen, rejected, pair_weight=weight, view_weights=pi)
    expected = {
        "loss": loss,
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
        "router_entropy": -(pi * pi.log()).sum(dim=1).mean(),
        "view_weight_last": pi[:, 0].mean(),
        "view_weight_mean": pi[:, 1].mean(),
        "view_weight_attention": pi[:, 2].mean(),
    }
    for name, value in expected.items():
        assert entry[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_an_uneven_last_evaluation_batch_weighs_by_its_pairs(backbone, tmp_path):
    trainer = toy_trainer(
        toy_judge(backbone),
        tmp_path,
        toy_rows(7),
        per_device_eval_batch_size=4,
        num_train_epochs=1,
        max_steps=-1,
    )
    trainer.train()
    uneven = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 7
    whole = trainer.evaluate()
    for name in ("loss", "accuracy", "margin"):
        assert uneven[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-5, abs=1e-7)


def test_equal_rewards_are_not_accurate(backbone, tmp_path):
    rows = [{"prompt": "hello", "chosen": "The sky is blue.", "rejected": "The sky is blue."}] * 4
    metrics = toy_trainer(toy_judge(backbone), tmp_path, rows).evaluate()
    assert metrics["eval_accuracy"] == 0.0
    assert metrics["eval_margin"] == 0.0


def test_the_loss_is_the_papers_with_the_arguments_numbers(backbone, tmp_path):
    numbers = {"gamma": 1.5, "temperature": 0.7, "entropy_floor": 1.09, "entropy_weight": 3.0}
    trainer = toy_trainer(toy_judge(backbone), tmp_path, toy_rows(), **numbers)
    batch = collated(trainer, 4)
    batch["pair_weight"] = torch.tensor([1.0, 0.5, 2.0, 1.0])
    loss, out = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    chosen, rejected = out["logits"][:, 0].chunk(2)
    expected = focal_bradley_terry_loss(
        chosen, rejected, pair_weight=batch["pair_weight"], view_weights=out["view_weights"], **numbers
    )
    assert torch.equal(loss, expected)


def test_an_odd_number_of_rows_is_refused(backbone, tmp_path):
    trainer = toy_trainer(toy_judge(backbone), tmp_path, toy_rows())
    batch = {name: value[:3] for name, value in collated(trainer, 2).items()}
    with pytest.raises(ValueError, match="3 rows came"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(backbone, tmp_path, lora):
    """Losses, accuracies and weights, bit for bit, although the logs' windows do not end at the checkpoint."""

    def trainer(folder):
        model = toy_judge(backbone)
        model = add_lora(model, r=4, dropout=0.3) if lora else model
        options = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 2, "max_steps": 9}
        return toy_trainer(model, tmp_path / folder, toy_rows(28), lr_scheduler_type="cosine", **options)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for key in ("loss", "accuracy", "margin", "grad_norm", "learning_rate"):
        assert logged(resumed, key) == logged(whole, key)
    assert set(logged(whole)) == {2, 4, 5, 6, 8, 9}
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    lines = [json.loads(line) for line in (tmp_path / "resumed" / "training_log.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 5, 6, 8, 9]


@pytest.mark.parametrize("pairs", [32, 14], ids=["even", "a-short-last-one"])
def test_accumulated_batches_equal_a_large_one(backbone, tmp_path, pairs):
    curves = []
    for size, steps in ((4, 4), (16, 1)):
        trainer = toy_trainer(
            toy_judge(backbone), tmp_path / str(size), toy_rows(pairs), max_steps=3,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer.train()
        curves.append([v for key in ("loss", "grad_norm", "margin") for v in logged(trainer, key).values()])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_gradient_checkpointing_changes_no_loss(backbone, tmp_path):
    curves = []
    for on in (False, True):
        model = toy_judge(backbone)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = toy_trainer(model, tmp_path / str(on), toy_rows(), max_steps=3)
        trainer.train()
        curves.append(list(logged(trainer).values()))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_autocast_learns_as_fp32_does(trained, backbone, tmp_path, dtype):
    model = add_lora(toy_judge(backbone, dtype=dtype), r=4)
    trainer = toy_trainer(model, tmp_path, toy_rows(), bf16=True, max_steps=16, learning_rate=5e-3)
    trainer.train()
    assert logged(trainer)[1] == pytest.approx(logged(trained)[1], rel=0.05)
    last = [logged(trainer)[step] for step in range(13, 17)]
    assert sum(last) / 4 < 0.1 * logged(trainer)[1]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_loss_that_is_not_finite_ends_the_training(backbone, tmp_path):
    model = toy_judge(backbone)
    torch.nn.init.constant_(model.head.experts.view_out_bias, float("nan"))
    with pytest.raises(FloatingPointError, match="at step 1"):
        toy_trainer(model, tmp_path, toy_rows()).train()


def test_a_saved_judge_scores_at_once_as_it_was_trained(trained, tmp_path):
    trained.save_model(str(tmp_path))
    scorer = Scorer.from_pretrained(tmp_path)
    assert scorer.model.config.turn_boundary == scorer.encoder.boundary.to_dict()
    batch = collated(trained, 1)
    with torch.no_grad():
        expected = trained.model.eval()(**{k: v for k, v in batch.items() if k != "pair_weight"}).logits[:, 0]
    row = toy_rows()[0]
    rewards = [scorer.score_response(row["prompt"], row[side]).reward for side in ("chosen", "rejected")]
    assert rewards == pytest.approx(expected.tolist(), abs=1e-5)
