"""What a run was asked for, kept beside its checkpoints, so that none goes on as another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adajudge.configuration import HEAD_FIELDS
from adajudge.scoring.description import differences
from adajudge.weights import digest_of_weights

if TYPE_CHECKING:
    from .trainer import AdaJudgeTrainer

RUN_NAME = "run.json"

# Of the training arguments: what decides which pairs a step reads and what it does with them. How long to train, and when
# to save, log and evaluate, may be asked for anew.
_ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed", "bf16",
    "gamma", "temperature", "entropy_floor", "entropy_weight",
)  # fmt: skip
_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules")


def describe_run(trainer: AdaJudgeTrainer) -> dict[str, Any]:
    """A run in JSON's types: training arguments, head, LoRA matrices, data, and where weights stay as they are, these."""
    arguments, config = trainer.args, trainer.model.config
    found = {name: getattr(arguments, name) for name in _ARGUMENTS}
    found |= {name: getattr(config, name) for name in HEAD_FIELDS}
    for adapter in getattr(trainer.model, "peft_config", {}).values():
        found |= {f"lora_{name.removeprefix('lora_')}": getattr(adapter, name) for name in _LORA}
    found["pairs_per_step"] = (
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    found["pairs"], found["train_data"] = len(trainer.train_dataset), trainer.train_dataset.digest()
    fixed = {
        name: x for name, x in trainer.model.named_parameters() if "backbone." in name and not x.requires_grad
    }
    if fixed:
        found["base_weights"] = digest_of_weights(fixed)
    described: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return described


def begin_run(trainer: AdaJudgeTrainer, checkpoint: str | None) -> int:
    """The step that a run begins at. What it is asked for is written into its folder, or compared with what was: a
    checkpoint without a description beside it passes.

    Raises:
        ValueError: the checkpoint is of another run; it names what differs.
    """
    described, step = describe_run(trainer), 0
    if checkpoint is not None:
        file = Path(checkpoint).parent / RUN_NAME
        was = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else described
        if differing := differences(was, described):
            raise ValueError(f"{checkpoint} is of a run that was asked for differently: {differing}")
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        step = int(state["global_step"])
    if trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN_NAME).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return step
