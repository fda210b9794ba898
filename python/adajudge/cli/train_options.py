"""Options of ``adajudge train``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from adajudge.cli.options import add_option, boolean, number
from adajudge.cli.train_data import BAD_ROWS_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All of them, named as transformers and TRL name them."""
    whole, share = number(int, 1), number(_step_count, 0, open_end=True)
    from_zero, above_zero = number(float, 0), number(float, 0, open_end=True)

    group = parser.add_argument_group("model and data")
    _add(group, "model_name_or_path", "backbone, saved judge or LoRA adapter of one", str, required=True)
    _add(group, "train_data", "preference pairs: .jsonl, .jsonl.gz, .json, .parquet", str, required=True)
    _add(group, "eval_data", "pairs to evaluate on", str)
    _add(group, "output_dir", "folder for the judge, checkpoints and logs", str, required=True)
    _add(group, "max_length", "tokens of a sequence; default: the backbone's limit. Longer prompts lose their "
         "beginning; pairs with a longer response are left out and reported", whole)  # fmt: skip
    _add(group, "truncate_response", "cut a response that does not fit instead of leaving its pair out", bool)
    _add(group, "skip_bad_rows", f"train without malformed rows; they are listed in OUTPUT_DIR/{BAD_ROWS_NAME}",
         bool)  # fmt: skip
    _add(group, "chat_template_path", "Jinja file in place of the tokenizer's chat template", str)
    _add(group, "dtype", "of the loaded weights; default: float32 where the backbone is trained, else as saved",
         str, choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    _add(group, "attn_implementation", "eager, sdpa, adajudge, flash_attention_2 ..", str)

    group = parser.add_argument_group("head and loss")
    _add(group, "num_blocks", "refinement blocks of a new head, 1 to 8; default 3", number(int, 1, 8))
    _add(group, "attention_tokens", "what the attention view of a new head sees; default all", str,
         choices=("all", "response"))  # fmt: skip
    _add(group, "gamma", "focusing exponent; 0 is plain Bradley-Terry; default 2", from_zero)
    _add(group, "temperature", "of the Bradley-Terry model; default 1", above_zero)
    _add(group, "entropy_floor", "router entropy in nats below which it is penalised; default 0.5", from_zero)
    _add(group, "entropy_weight", "weight of that penalty; default 0.1", from_zero)
    _add(group, "freeze_backbone", "train the head alone", bool)

    group = parser.add_argument_group("LoRA")
    _add(group, "use_peft", "train LoRA matrices on the backbone, and the head in full", bool)
    _add(group, "lora_r", "rank; default 16", whole)
    _add(group, "lora_alpha", "scale times rank; default 32", whole)
    _add(group, "lora_dropout", "default 0.05", number(float, 0, 1))
    _add(group, "lora_target_modules", "linear layers of the backbone (q_proj v_proj ..); default all-linear", str,
         nargs="+")  # fmt: skip
    _add(group, "merge_lora", "save the merged judge in OUTPUT_DIR, the adapter in OUTPUT_DIR/adapter", bool)

    group = parser.add_argument_group("training, as in transformers' TrainingArguments")
    _add(group, "learning_rate", "default 1e-5; 1e-4 with use_peft or freeze_backbone", above_zero)
    _add(group, "num_train_epochs", "default 3", above_zero)
    _add(group, "max_steps", "instead of epochs; default -1: epochs count", _step_limit)
    _add(group, "per_device_train_batch_size", "pairs; default 8", whole)
    _add(group, "per_device_eval_batch_size", "pairs; default 8", whole)
    _add(group, "gradient_accumulation_steps", "default 1", whole)
    _add(group, "warmup_steps", "steps, or below 1 the share of all steps; default 0", number(_step_count, 0))
    _add(group, "warmup_ratio", "the share of all steps, another way to say it", number(float, 0, 1))
    _add(group, "lr_scheduler_type", "linear, cosine, constant_with_warmup ..; default linear", str)
    _add(group, "optim", "default adamw_torch_fused where it runs", str)
    _add(group, "weight_decay", "default 0", from_zero)
    _add(group, "max_grad_norm", "default 1", from_zero)
    _add(group, "bf16", "bfloat16 autocast", bool)
    _add(group, "gradient_checkpointing", "less memory for more arithmetic", bool)
    _add(group, "seed", "default 42", number(int, 0, 2**32 - 1))
    _add(group, "logging_steps", "default 10; below 1: the share of all steps", share, default=10)
    _add(group, "save_strategy", "default steps", _strategy, choices=("no", "steps", "epoch"))
    _add(group, "save_steps", "default 500; below 1: the share of all steps", share)
    _add(group, "save_total_limit", "checkpoints that are kept; default all", whole)
    _add(group, "eval_strategy", "default: steps with eval_steps, else epoch", _strategy,
         choices=("no", "steps", "epoch"))  # fmt: skip
    _add(group, "eval_steps", "steps between evaluations; below 1: the share of all steps", share)
    _add(group, "dataloader_num_workers", "default 0", number(int, 0))
    _add(group, "report_to", "wandb, tensorboard ..; default none", str, nargs="+", default=["none"])
    _add(group, "use_cpu", "train on the CPU although there is an accelerator", bool)
    _add(group, "resume_from_checkpoint", "folder of a checkpoint; without a folder the latest in OUTPUT_DIR",
         str, nargs="?", const="true")  # fmt: skip


def _add(group: Any, name: str, text: str, kind: Callable[[str], Any], **options: Any) -> None:
    """An option with its converter; a switch is given bare, or as true or false."""
    if kind is bool:
        options = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "true|false"}
    else:
        options["type"] = kind
        if "choices" not in options:
            options.setdefault("metavar", "X")
    add_option(group, name, help=text, **options)


def _strategy(text: str) -> str:
    """YAML reads a bare `no` as false."""
    return "no" if text.lower() == "false" else text


def _step_count(text: str) -> int | float:
    value = float(text)
    return int(value) if value == int(value) else value


def _step_limit(text: str) -> int:
    value: int = number(int, -1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a number of at least 1, or -1; 0 came")
    return value
