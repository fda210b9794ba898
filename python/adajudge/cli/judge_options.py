"""Options of the commands that score: which judge, and how it reads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from adajudge.cli.options import add_option

if TYPE_CHECKING:
    from adajudge.scoring import Scorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that `load_scorer` reads."""

    def add(name: str, **options: Any) -> None:
        add_option(parser, name, **options)

    add("model", metavar="DIR", help="folder of a saved judge; default: the built-in judge")
    add("max_length", type=int, help="tokens; default: the backbone's limit")
    add("token_budget", type=int, help="tokens read at once; default: 2,048 on the CPU, else 32,768")
    add(
        "attn_implementation",
        metavar="NAME",
        help="adajudge, sdpa, eager, flash_attention_2 ..; default: adajudge where it serves the backbone",
    )
    add(
        "compile_backbone",
        action="store_true",
        help="put the backbone under torch.compile; takes a minute or more at the start",
    )
    add(
        "truncate_response",
        action="store_true",
        help="cut a response that does not fit instead of refusing its row",
    )
    add("allow_unknown", action="store_true", help="score rows although the judge does not know their words")
    add(
        "device",
        help="cpu, cuda, cuda:1 ..; default: CUDA where there is one, under torchrun that of LOCAL_RANK",
    )
    add("dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")


def load_scorer(args: argparse.Namespace, device: str | None, **options: Any) -> Scorer:
    """The judge of `args` on a device.

    Raises:
        ValueError: the device or the judge cannot be used.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from adajudge.scoring import Scorer

    transformers_logging.disable_progress_bar()
    if device is not None:
        try:
            torch.empty(0, device=device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {device} cannot be used: {reason}") from None
    if args.allow_unknown:
        options["unknown_limit"] = 1.0
    try:
        return Scorer.from_pretrained(
            args.model,
            device=device,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            attn_implementation=args.attn_implementation,
            max_length=args.max_length,
            token_budget=args.token_budget,
            truncate_response=args.truncate_response,
            compile_backbone=args.compile_backbone,
            **options,
        )
    except (TypeError, AttributeError, KeyError) as error:  # of a config.json that is something else
        raise ValueError(
            f"{args.model}: cannot be loaded as a judge: {type(error).__name__}: {error}"
        ) from error
