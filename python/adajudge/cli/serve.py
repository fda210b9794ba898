"""Serve a judge over HTTP to the reward clients of OpenRLHF, vLLM (verl), SGLang and OpenAI.

Runs until SIGTERM or SIGINT, then answers what it has accepted and exits with 0; with 1 where a second SIGINT came before
that. 2: the judge, the address or an option cannot be used, or the server crashed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

from adajudge.cli import judge_options
from adajudge.cli.judge_options import load_scorer
from adajudge.cli.options import add_option

if TYPE_CHECKING:
    from adajudge.scoring import Scorer

_KEY = "ADAJUDGE_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``adajudge serve``."""

    def add(name: str, **options: Any) -> None:
        add_option(parser, name, **options)

    judge_options.add_arguments(parser)
    add("host", default="127.0.0.1", help="address to bind; others than loopback need a key")
    add("port", type=_port, default=8000, help="0 chooses a free one; the URL is printed")
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


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} came, expected 0 to 65535")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    from adajudge.serving import Settings, bind, is_loopback, serve

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
        with bind(args.host, args.port) as address:
            scorer = load_scorer(args, args.device)
            ending = serve(scorer, settings, address, lambda url: _announce(url, settings.model_name, scorer))
    except ModuleNotFoundError:  # the command line says what to install
        raise
    except (OSError, OverflowError, ValueError) as error:
        print(f"adajudge serve: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # 1 would say that it was asked twice to end
        traceback.print_exc()
        print(f"adajudge serve: crashed with {type(error).__name__}, see above", file=sys.stderr)
        return 2
    code = 0 if ending.drained else 1
    if not ending.idle:
        _exit(code)
    return code


def _name_of(model: str | None) -> str:
    return "adajudge-built-in" if model is None else os.path.basename(os.path.normpath(model))


def _exit(code: int) -> None:
    """End the process although a thread is in the engine, which an orderly end might wait for or crash on."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _announce(url: str, name: str, scorer: Scorer) -> None:
    attention = scorer.model.backbone.config.get_text_config(decoder=True)._attn_implementation
    print(f"serving {name} on {scorer.engine.device}, attention {attention!r}", file=sys.stderr)
    print(f"listening on {url}", flush=True)
