"""Train a judge on preference pairs: a new head on a backbone, or a saved judge further.

Exit code 0: trained and saved. 1: training failed. 2: an option, the data or the model cannot be used; nothing was
trained. 130: interrupted; the checkpoints that were saved are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adajudge.cli import train_options
from adajudge.cli.options import UsageError
from adajudge.cli.train_checks import check_backends, check_combinations, checkpoint_of, training_arguments
from adajudge.cli.train_data import check_sources, load_data

if TYPE_CHECKING:
    from adajudge.training import AdaJudgeTrainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``adajudge train``."""
    train_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train as `args` say."""
    import torch
    from transformers.trainer_utils import get_last_checkpoint

    try:
        checkpoint = checkpoint_of(args)
        trainer = _prepare(args)
        began = _begin(trainer, checkpoint)
    except UsageError as error:
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
        UsageError: and it is said what.
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
    check_sources(args)
    check_combinations(args)
    training = training_arguments(args)
    check_backends(training.device)
    set_seed(training.seed)  # the new head's weights
    model = _load_model(args)
    try:
        tokenizer = load_tokenizer(args.model_name_or_path)
        if args.chat_template_path is not None:
            tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
        max_length = model.config.longest_sequence(args.max_length)
        encoder = ConversationEncoder(tokenizer, max_length, truncate_response=args.truncate_response)
    except ChatTemplateError as error:
        raise UsageError(f"{error}; on this command line: --chat_template_path FILE") from error
    except TokenizerError as error:
        raise UsageError(str(error)) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer of {args.model_name_or_path}: {error}") from error
    model.config.turn_boundary = encoder.boundary.to_dict()
    train, evaluation = load_data(args, encoder, training.should_save)
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
            raise UsageError(str(error)) from error
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
        raise UsageError(f"training options: {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


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
    # The last three: of a config.json that is something else.
    except (OSError, ValueError, ImportError, TypeError, AttributeError, KeyError) as error:
        where = "" if Path(name).is_dir() else "no such folder, and no such model on the hub: "
        raise UsageError(f"model_name_or_path {name}: {where}{error}") from error


def _begin(trainer: AdaJudgeTrainer, checkpoint: str | None) -> int:
    """The step that training begins at."""
    from adajudge.training.resumption import begin_run

    try:
        return begin_run(trainer, checkpoint)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(
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
