"""What ``adajudge train`` looks at before it loads anything: options that go together, the folder, the backends."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adajudge.cli.options import UsageError

if TYPE_CHECKING:
    from adajudge.training import AdaJudgeTrainingArguments


def check_combinations(args: argparse.Namespace) -> None:
    """Options that exclude each other, or are nothing without another one.

    Raises:
        UsageError: such options came.
    """
    for first, second in (("freeze_backbone", "use_peft"), ("warmup_steps", "warmup_ratio")):
        if getattr(args, first) and getattr(args, second):
            raise UsageError(f"{first} and {second} came; only one of them can be followed")
    for option, needed in (
        ("merge_lora", "use_peft"),
        ("lora_r", "use_peft"),
        ("lora_alpha", "use_peft"),
        ("lora_dropout", "use_peft"),
        ("lora_target_modules", "use_peft"),
        ("eval_steps", "eval_data"),
        ("eval_strategy", "eval_data"),
    ):
        value = getattr(args, option)
        is_given = value is not None and value is not False and value != "no"
        if is_given and not getattr(args, needed):
            raise UsageError(f"{option} came without {needed}")
    if args.warmup_ratio == 1:  # which transformers takes for one step
        raise UsageError("warmup_ratio: 1 came, expected less: all steps would be warm-up")


def training_arguments(args: argparse.Namespace) -> AdaJudgeTrainingArguments:
    """The trainer's own options, with this command's defaults.

    Raises:
        UsageError: transformers refuses them.
    """
    import torch

    from adajudge.training import AdaJudgeTrainingArguments

    known = {field.name for field in dataclasses.fields(AdaJudgeTrainingArguments)}
    given = {key: value for key, value in vars(args).items() if key in known and value is not None}
    given.pop("resume_from_checkpoint", None)
    if args.warmup_ratio:
        given["warmup_steps"] = args.warmup_ratio
    if args.eval_data is not None:
        given.setdefault("eval_strategy", "steps" if args.eval_steps else "epoch")
    given.setdefault("learning_rate", 1e-4 if args.use_peft or args.freeze_backbone else 1e-5)
    if given.pop("gradient_checkpointing"):  # transformers 5.23 renamed it
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        given |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}  # also with a frozen embedding
    given["use_cpu"] = args.use_cpu or not torch.accelerator.is_available()
    given["dataloader_pin_memory"] = not given["use_cpu"]
    try:
        return AdaJudgeTrainingArguments(disable_tqdm=True, **given)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"training options: {error}") from error


def checkpoint_of(args: argparse.Namespace) -> str | None:
    """The checkpoint to resume from; `true` is the latest of the output folder.

    Without one the output folder must be free: beside what an earlier run left there, nobody could tell which
    weights and checkpoints are whose.

    Raises:
        UsageError: there is no such checkpoint, or the output folder is not free.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from adajudge.adapters import is_adapter

    asked, output = args.resume_from_checkpoint, Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise UsageError(f"output_dir: {output} is a file; expected a folder")
    if asked is None or asked.lower() == "false":
        names = ("model*.safetensors", "adapter_model.safetensors", "checkpoint-*")
        found = sorted(path.name for name in names for path in output.glob(name))
        if found:
            raise UsageError(
                f"output_dir: {output} holds {found[0]} of an earlier run; name another folder, remove what is "
                "there, or go on with it by --resume_from_checkpoint"
            )
        return None
    if asked.lower() == "true":
        asked = get_last_checkpoint(output) if output.is_dir() else None
        if asked is None:
            raise UsageError(f"resume_from_checkpoint: no checkpoint in {output}")
    if not (Path(asked) / "trainer_state.json").is_file():
        raise UsageError(f"resume_from_checkpoint: {asked} is no checkpoint (no trainer_state.json there)")
    if is_adapter(asked) != args.use_peft:
        kind = "without" if args.use_peft else "with"
        raise UsageError(f"resume_from_checkpoint: {asked} is of a run {kind} use_peft")
    return str(asked)


def check_backends(device: Any) -> None:
    """A forced backend that cannot serve every operation would end the first step.

    Raises:
        UsageError: it cannot.
    """
    from adajudge_kernels.backends import FAMILIES, choose_backend

    try:
        for family in FAMILIES:
            choose_backend(device, family)
    except ValueError as error:
        raise UsageError(str(error)) from error
