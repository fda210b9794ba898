"""Train a judge on preference pairs: a new head on a backbone, or a saved judge further.

Exit code 0: trained and saved. 1: training failed. 2: an option, the data or the model cannot be used; nothing was
trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adajudge.cli.options import add_option

if TYPE_CHECKING:
    from adajudge.data import Row, RowError
    from adajudge.training import AdaJudgeTrainer, AdaJudgeTrainingArguments, LoadedPairs

BAD_ROWS_NAME = "bad_rows.jsonl"

_SHOWN_ROWS = 20


class _UsageError(Exception):
    """An option, the data or the model cannot be used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``adajudge train``, named as transformers and TRL name them."""
    whole, share = _number(int, 1), _number(_step_count, 0, open_end=True)
    from_zero, above_zero = _number(float, 0), _number(float, 0, open_end=True)

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
    _add(group, "num_blocks", "refinement blocks of a new head, 1 to 8; default 3", _number(int, 1, 8))
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
    _add(group, "lora_dropout", "default 0.05", _number(float, 0, 1))
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
    _add(
        group, "warmup_steps", "steps, or below 1 the share of all steps; default 0", _number(_step_count, 0)
    )
    _add(group, "warmup_ratio", "the share of all steps, another way to say it", _number(float, 0, 1))
    _add(group, "lr_scheduler_type", "linear, cosine, constant_with_warmup ..; default linear", str)
    _add(group, "optim", "default adamw_torch_fused where it runs", str)
    _add(group, "weight_decay", "default 0", from_zero)
    _add(group, "max_grad_norm", "default 1", from_zero)
    _add(group, "bf16", "bfloat16 autocast", bool)
    _add(group, "gradient_checkpointing", "less memory for more arithmetic", bool)
    _add(group, "seed", "default 42", _number(int, 0, 2**32 - 1))
    _add(group, "logging_steps", "default 10; below 1: the share of all steps", share, default=10)
    _add(group, "save_strategy", "default steps", _strategy, choices=("no", "steps", "epoch"))
    _add(group, "save_steps", "default 500; below 1: the share of all steps", share)
    _add(group, "save_total_limit", "checkpoints that are kept; default all", whole)
    _add(group, "eval_strategy", "default: steps with eval_steps, else epoch", _strategy,
         choices=("no", "steps", "epoch"))  # fmt: skip
    _add(group, "eval_steps", "steps between evaluations; below 1: the share of all steps", share)
    _add(group, "dataloader_num_workers", "default 0", _number(int, 0))
    _add(group, "report_to", "wandb, tensorboard ..; default none", str, nargs="+", default=["none"])
    _add(group, "use_cpu", "train on the CPU although there is an accelerator", bool)
    _add(group, "resume_from_checkpoint", "folder of a checkpoint; without a folder the latest in OUTPUT_DIR",
         str, nargs="?", const="true")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train as `args` say."""
    import torch
    from transformers.trainer_utils import get_last_checkpoint

    try:
        checkpoint = _checkpoint(args)
        trainer = _prepare(args)
        began = _begin(trainer, checkpoint)
    except _UsageError as error:
        print(f"adajudge train: {error}", file=sys.stderr)
        return 2
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.state.global_step == began and trainer.is_world_process_zero():
            print(
                f"adajudge train: nothing was left to train: {checkpoint} is at step {began}", file=sys.stderr
            )
        _evaluate_at_end(trainer)
        _save(args, trainer)
    except KeyboardInterrupt:
        kept = get_last_checkpoint(args.output_dir)
        hint = f"{kept} is kept: --resume_from_checkpoint goes on" if kept else "no checkpoint was saved"
        print(f"adajudge train: interrupted at step {trainer.state.global_step}; {hint}", file=sys.stderr)
        return 130
    except (FloatingPointError, torch.OutOfMemoryError, OSError, ValueError, ImportError) as error:
        step = trainer.state.global_step
        print(f"adajudge train: failed at step {step}: {error}", file=sys.stderr)
        return 1 if step else 2  # before the first step: an option that only the training itself looks at
    if trainer.is_world_process_zero():
        _report(args, trainer)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a process that leaves its group unasked may abort
    return 0


def _prepare(args: argparse.Namespace) -> AdaJudgeTrainer:
    """Everything before the first step; whatever is wrong with options, data or model is found here.

    Raises:
        _UsageError: and it is said what.
    """
    from transformers import PrinterCallback, set_seed
    from transformers.utils import logging as transformers_logging

    from adajudge.data import (
        ChatTemplateError,
        ConversationEncoder,
        PairCollator,
        TokenizerError,
        load_tokenizer,
    )
    from adajudge.training import AdaJudgeTrainer, TrainingRecord, TrainingTable, add_lora

    transformers_logging.disable_progress_bar()
    bad_rows = Path(args.output_dir) / BAD_ROWS_NAME
    for option, source in (("train_data", args.train_data), ("eval_data", args.eval_data)):
        if source is not None and os.path.exists(source) and bad_rows.exists() and bad_rows.samefile(source):
            raise _UsageError(
                f"{option}: {source} would be overwritten by the list of bad rows; move it elsewhere"
            )
    training = _training_arguments(args)
    _check_backends(training.device)
    set_seed(training.seed)  # the new head's weights
    model = _load_model(args)
    try:
        tokenizer = load_tokenizer(args.model_name_or_path)
        if args.chat_template_path is not None:
            tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
        max_length = model.config.longest_sequence(args.max_length)
        encoder = ConversationEncoder(tokenizer, max_length, truncate_response=args.truncate_response)
    except ChatTemplateError as error:
        raise _UsageError(f"{error}; on this command line: --chat_template_path FILE") from error
    except TokenizerError as error:
        raise _UsageError(str(error)) from error
    except (OSError, ValueError) as error:
        raise _UsageError(f"tokenizer of {args.model_name_or_path}: {error}") from error
    model.config.turn_boundary = encoder.boundary.to_dict()
    train, evaluation = _load_data(args, encoder, training.should_save)
    if args.freeze_backbone:
        model.backbone.requires_grad_(False)
    if args.use_peft:
        names = args.lora_target_modules
        options = {
            "r": args.lora_r,
            "alpha": args.lora_alpha,
            "dropout": args.lora_dropout,
            "target_modules": [names] if isinstance(names, str) else names,  # one name from a YAML file
        }
        try:
            model = add_lora(model, **{key: value for key, value in options.items() if value is not None})
        except ValueError as error:
            raise _UsageError(str(error)) from error
    try:
        trainer = AdaJudgeTrainer(
            model,
            training,
            train_dataset=train.dataset,
            eval_dataset=None if evaluation is None else evaluation.dataset,
            processing_class=tokenizer,
            data_collator=PairCollator(0),  # any id: padding is known by its mask alone
            callbacks=[TrainingRecord(args.output_dir), TrainingTable()],
        )
    except (ValueError, ImportError) as error:
        raise _UsageError(f"training options: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check_backends(device: Any) -> None:
    """A forced backend that cannot serve every operation would end the first step."""
    from adajudge_kernels.backends import FAMILIES, choose_backend

    try:
        for family in FAMILIES:
            choose_backend(device, family)
    except ValueError as error:
        raise _UsageError(str(error)) from error


def _training_arguments(args: argparse.Namespace) -> AdaJudgeTrainingArguments:
    import dataclasses

    import torch

    from adajudge.training import AdaJudgeTrainingArguments

    for first, second in (("freeze_backbone", "use_peft"), ("warmup_steps", "warmup_ratio")):
        if getattr(args, first) and getattr(args, second):
            raise _UsageError(f"{first} and {second} came; only one of them can be followed")
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
            raise _UsageError(f"{option} came without {needed}")
    known = {field.name for field in dataclasses.fields(AdaJudgeTrainingArguments)}
    given = {key: value for key, value in vars(args).items() if key in known and value is not None}
    given.pop("resume_from_checkpoint", None)
    if args.warmup_ratio == 1:  # which transformers takes for one step
        raise _UsageError("warmup_ratio: 1 came, expected less: all steps would be warm-up")
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
        raise _UsageError(f"training options: {error}") from error


def _load_model(args: argparse.Namespace) -> Any:
    from adajudge.loading import load_judge

    name = args.model_name_or_path
    head = {key: getattr(args, key) for key in ("num_blocks", "attention_tokens") if getattr(args, key)}
    frozen = args.use_peft or args.freeze_backbone
    try:
        return load_judge(
            name,
            dtype=args.dtype or ("auto" if frozen else "float32"),
            attn_implementation=args.attn_implementation,
            **head,
        )
    except (
        OSError,
        ValueError,
        ImportError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:  # or a strange config.json
        where = "" if Path(name).is_dir() else "no such folder, and no such model on the hub: "
        raise _UsageError(f"model_name_or_path {name}: {where}{error}") from error


def _load_data(
    args: argparse.Namespace, encoder: Any, main_process: bool
) -> tuple[LoadedPairs, LoadedPairs | None]:
    """Read both files, say what was met, refuse what was not agreed to."""
    from adajudge.data import DataFileError
    from adajudge.training import load_pairs

    sources = [("train_data", args.train_data)]
    if args.eval_data is not None:
        sources.append(("eval_data", args.eval_data))
    loaded = []
    for option, source in sources:
        try:
            loaded.append(load_pairs(source, encoder, progress=_progress(option)))
        except DataFileError as error:
            raise _UsageError(f"{option}: {error}") from error
    if main_process:
        for (option, _), pairs in zip(sources, loaded, strict=True):
            print(f"{option}: {pairs.summary()}", file=sys.stderr)
        _write_bad_rows(Path(args.output_dir) / BAD_ROWS_NAME, loaded)
        for pairs in loaded:
            _print_rows(pairs)
    bad = sum(len(pairs.bad_rows) for pairs in loaded)
    if bad and not args.skip_bad_rows:
        raise _UsageError(f"{bad} bad rows; mend them, or leave them out with --skip_bad_rows")
    for (option, source), pairs in zip(sources, loaded, strict=True):
        if not len(pairs.dataset):
            raise _UsageError(f"{option}: no usable pair in {source}")
    return loaded[0], loaded[1] if len(loaded) > 1 else None


def _write_bad_rows(path: Path, loaded: Iterable[LoadedPairs]) -> None:
    records = [
        {"file": pairs.source, **asdict(row)} for pairs in loaded for row in pairs.bad_rows + pairs.too_long
    ]
    if not records:
        path.unlink(missing_ok=True)  # of an earlier run of the same command
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    print(f"not used for training: {len(records)} rows, see {path}", file=sys.stderr)


def _print_rows(pairs: LoadedPairs) -> None:
    rows: list[RowError] = pairs.bad_rows + pairs.too_long
    for row in rows[:_SHOWN_ROWS]:
        print(f"  {pairs.source}: {row}", file=sys.stderr)
    if len(rows) > _SHOWN_ROWS:
        print(f"  {pairs.source}: and {len(rows) - _SHOWN_ROWS} more", file=sys.stderr)


def _progress(option: str) -> Callable[[Iterable[Row | RowError]], Iterable[Row | RowError]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda rows: track(rows, option, console=console, transient=True, disable=not console.is_terminal)


def _checkpoint(args: argparse.Namespace) -> str | None:
    """The checkpoint to resume from; `true` is the latest of the output folder.

    Without one the output folder must be free: beside what an earlier run left there, nobody could tell which
    weights and checkpoints are whose.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from adajudge.weights import is_adapter

    asked, output = args.resume_from_checkpoint, Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise _UsageError(f"output_dir: {output} is a file; expected a folder")
    if asked is None or asked.lower() == "false":
        names = ("model*.safetensors", "adapter_model.safetensors", "checkpoint-*")
        found = sorted(path.name for name in names for path in output.glob(name))
        if found:
            raise _UsageError(
                f"output_dir: {output} holds {found[0]} of an earlier run; name another folder, remove what is "
                "there, or go on with it by --resume_from_checkpoint"
            )
        return None
    if asked.lower() == "true":
        asked = get_last_checkpoint(output) if output.is_dir() else None
        if asked is None:
            raise _UsageError(f"resume_from_checkpoint: no checkpoint in {output}")
    if not (Path(asked) / "trainer_state.json").is_file():
        raise _UsageError(f"resume_from_checkpoint: {asked} is no checkpoint (no trainer_state.json there)")
    if is_adapter(asked) != args.use_peft:
        kind = "without" if args.use_peft else "with"
        raise _UsageError(f"resume_from_checkpoint: {asked} is of a run {kind} use_peft")
    return str(asked)


def _begin(trainer: AdaJudgeTrainer, checkpoint: str | None) -> int:
    """The step that training begins at."""
    from adajudge.training.resumption import begin_run

    try:
        return begin_run(trainer, checkpoint)
    except (ValueError, KeyError, OSError) as error:
        raise _UsageError(
            f"resume_from_checkpoint: {error}" if checkpoint else f"output_dir: {error}"
        ) from error


def _evaluate_at_end(trainer: AdaJudgeTrainer) -> None:
    """Evaluate the final weights, unless the last step has just been."""
    if trainer.eval_dataset is None:
        return
    step = trainer.state.global_step
    if not any("eval_loss" in entry and entry["step"] == step for entry in trainer.state.log_history):
        trainer.evaluate()


def _save(args: argparse.Namespace, trainer: AdaJudgeTrainer) -> None:
    from adajudge.loading import load_judge

    if not args.merge_lora:
        trainer.save_model(args.output_dir)
    else:
        adapter = os.path.join(args.output_dir, "adapter")
        trainer.save_model(adapter)
        if trainer.args.should_save:
            load_judge(adapter, dtype=args.dtype).save_pretrained(args.output_dir)
            trainer.processing_class.save_pretrained(args.output_dir)
    trainer.save_state()


def _report(args: argparse.Namespace, trainer: AdaJudgeTrainer) -> None:
    from adajudge.training import draw_training_curve
    from adajudge.training.record import CURVE_NAME

    curve = os.path.join(args.output_dir, CURVE_NAME)
    try:
        draw_training_curve(trainer.state.log_history, curve)
    except ImportError:
        print(f"no {CURVE_NAME}: matplotlib is not installed", file=sys.stderr)
    history = trainer.state.log_history
    for name, keys in (("training", ("loss", "accuracy")), ("evaluation", ("eval_loss", "eval_accuracy"))):
        last = next((entry for entry in reversed(history) if keys[0] in entry), None)
        if last is not None:
            print(f"{name}: loss {last[keys[0]]:.4f}, accuracy {last[keys[1]]:.3f} at step {last['step']}")
    kind = "LoRA adapter with the head" if args.use_peft and not args.merge_lora else "judge"
    print(f"{kind} saved: {args.output_dir}")


def _add(group: Any, name: str, text: str, kind: Callable[[str], Any], **options: Any) -> None:
    """An option with its converter; a switch is given bare, or as true or false."""
    if kind is bool:
        options = {"type": _boolean, "nargs": "?", "const": True, "default": False, "metavar": "true|false"}
    else:
        options["type"] = kind
        if "choices" not in options:
            options.setdefault("metavar", "X")
    add_option(group, name, help=text, **options)


def _boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"true or false; {text!r} came")
    return values[text.lower()]


def _strategy(text: str) -> str:
    """YAML reads a bare `no` as false."""
    return "no" if text.lower() == "false" else text


def _step_count(text: str) -> int | float:
    value = float(text)
    return int(value) if value == int(value) else value


def _step_limit(text: str) -> int:
    value: int = _number(int, -1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a number of at least 1, or -1; 0 came")
    return value


def _number(
    kind: Callable[[str], Any], least: float, most: float = math.inf, open_end: bool = False
) -> Callable[[str], Any]:
    """A converter that refuses what lies outside a range; with `open_end` the least value too."""

    def convert(text: str) -> Any:
        expected = f"a number {'above' if open_end else 'of at least'} {least:g}"
        expected += "" if most == math.inf else f" and at most {most:g}"
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{expected}; {text!r} came") from None
        if not least <= value <= most or (open_end and value == least) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{expected}; {text} came")
        return value

    return convert
