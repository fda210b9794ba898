"""Serve a judge over HTTP to the reward clients of OpenRLHF, verl, vLLM and OpenAI.

Runs until SIGTERM or SIGINT, then answers what it has accepted and exits with 0; with 1 where a second SIGINT came before
that. 2: the judge, the address or an option cannot be used.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adajudge.scoring import Scorer

_KEY = "ADAJUDGE_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``adajudge serve``."""

    def add(name: str, **options: Any) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, **options)

    add("model", metavar="DIR", help="folder of a saved judge; default: the built-in judge")
    add("host", default="127.0.0.1", help="address to bind; others than loopback need a key")
    add("port", type=int, default=8000, help="0 chooses a free one; the URL is printed")
    add("api_key", metavar="KEY", help=f"that clients must send; better in the environment: {_KEY}")
    add("insecure", action="store_true", help="no key although others can reach the address")
    add("served_model_name", metavar="NAME", help="the judge's name in answers; default: its folder's")
    add(
        "max_batch_wait_ms",
        type=float,
        default=3.0,
        help="how long a request waits for others to be packed with",
    )
    add("max_queue", type=int, default=16384, help="responses accepted and not yet answered; more: 429")
    add("max_rows", type=int, default=8192, help="responses of one request; more: 413")
    add("max_body_mb", type=float, default=64.0, help="MiB of a request; more: 413")
    add("timeout", type=float, default=150.0, help="seconds for a request; more: 504")
    add("max_length", type=int, help="tokens; default: the backbone's limit")
    add("token_budget", type=int, help="tokens read at once; default: 4,096 on the CPU, else 32,768")
    add(
        "truncate_response",
        action="store_true",
        help="cut a response that does not fit instead of refusing it",
    )
    add("allow_unknown", action="store_true", help="score rows although the judge does not know their words")
    add("device", help="cpu, cuda, cuda:1 ..; default: CUDA where there is one")
    add("dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    add(
        "compile_backbone",
        action="store_true",
        help="put the backbone under torch.compile; the first requests wait",
    )
    add("attn_implementation", metavar="NAME", help="attention of the backbone; default: what serves it best")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    from adajudge.serving import Settings, is_loopback, serve

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        key = os.environ.get(_KEY) if args.api_key is None else args.api_key
        settings = Settings(
            model_name=args.served_model_name or _name_of(args.model),
            api_key=key,
            check_host=is_loopback(args.host),
            max_body_mb=args.max_body_mb,
            max_rows=args.max_rows,
            max_queue=args.max_queue,
            max_batch_wait_ms=args.max_batch_wait_ms,
            timeout=args.timeout,
        )
        if key is None and not args.insecure and not is_loopback(args.host):
            raise ValueError(
                f"--host {args.host}: others could reach it and there is no key; "
                f"set {_KEY} (or --api_key), or say --insecure"
            )
        scorer = _load(args)
        drained = serve(
            scorer, settings, args.host, args.port, lambda url: _announce(url, settings.model_name, scorer)
        )
    except (OSError, OverflowError, ValueError) as error:
        print(f"adajudge serve: {error}", file=sys.stderr)
        return 2
    return 0 if drained else 1


def _name_of(model: str | None) -> str:
    return "adajudge-built-in" if model is None else os.path.basename(os.path.normpath(model))


def _announce(url: str, name: str, scorer: Scorer) -> None:
    attention = scorer.model.backbone.config.get_text_config(decoder=True)._attn_implementation
    print(f"serving {name} on {scorer.engine.device}, attention {attention!r}", file=sys.stderr)
    print(f"listening on {url}", flush=True)


def _load(args: argparse.Namespace) -> Scorer:
    import torch
    from transformers.utils import logging as transformers_logging

    from adajudge.scoring import Scorer

    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {
        "token_budget": args.token_budget,
        "truncate_response": args.truncate_response,
        "compile_backbone": args.compile_backbone,
    }
    if args.max_length is not None:
        options["max_length"] = args.max_length
    if args.allow_unknown:
        options["unknown_limit"] = 1.0
    if args.device is not None:
        try:
            torch.empty(0, device=args.device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {args.device} cannot be used: {reason}") from None
    try:
        return Scorer.from_pretrained(
            args.model,
            device=args.device,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            attn_implementation=args.attn_implementation,
            **options,
        )
    except (TypeError, AttributeError, KeyError) as error:  # of a config.json that is something else
        raise ValueError(
            f"{args.model}: cannot be loaded as a judge: {type(error).__name__}: {error}"
        ) from error
