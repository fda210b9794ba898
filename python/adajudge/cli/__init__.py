"""The command line: ``adajudge score | train | eval | explain | serve | env``.

Heavy libraries are imported by the command that runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from adajudge.cli import environment, evaluate, explain, score, serve, train
from adajudge.cli.config_file import apply_config_file
from adajudge.cli.options import UsageError

_COMMANDS = {
    "score": (score, "score responses, pairs or candidates of a file"),
    "train": (train, "train a judge on preference pairs"),
    "eval": (evaluate, "evaluate a judge on RM-Bench, JudgeBench, RewardBench 2 or pairs"),
    "explain": (explain, "explain rewards: views, tokens, and what each part of a response adds"),
    "serve": (serve, "serve a judge over HTTP to the reward clients of RLHF"),
    "env": (environment, "what is installed, found and chosen, and why"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 1 rows or work failed, 2 wrong usage or, of score and serve, a crash)."""
    parser = argparse.ArgumentParser(
        prog="adajudge",
        description="AdaJudge reward models: score, train, evaluate, explain and serve.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        description = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        module.add_arguments(command)
        command.add_argument("--config", metavar="FILE", help="YAML file with options; the command line wins")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        apply_config_file(commands.choices, given)
    except UsageError as error:
        parser.error(str(error))
    args = parser.parse_args(given)
    try:
        return _COMMANDS[args.command][0].run(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "adajudge", "adajudge_kernels"):
            raise
        extra = (
            "plot"
            if package == "matplotlib"
            else args.command
            if args.command in ("train", "serve")
            else "model"
        )
        print(
            f"adajudge {args.command}: needs the package {package}, which is not installed: "
            f"pip install 'adajudge-kernels[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("adajudge: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, e.g. `adajudge ... | head`
        sys.stderr.close()
        return 1
