"""The blocks of the README and of the pages of docs/ about commands run as they stand; of serving and RLHF:
tests/adajudge/test_serving_docs.py."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import tables, with_tables
from tests.adajudge.forking_adajudge import ForkingAdajudge

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
_WITH_BAD_ROWS = [[command, "examples/pairs.jsonl"] for command in ("score", "eval")]
PAGES = README + "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("training.md", "evaluation.md", "explaining.md")
)
SCORING = (ROOT / "docs/scoring.md").read_text(encoding="utf-8")  # whose commands name files that nobody has
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES + SCORING, re.DOTALL)
COMMANDS = [
    block.replace("\\\n", " ").splitlines() for block in re.findall(r"```sh\n(.*?)```", PAGES, re.DOTALL)
]


def test_the_readme_has_blocks_of_these_two_kinds_only():
    assert len(BLOCKS) >= 3
    assert sum(map(len, COMMANDS)) >= 8
    assert set(re.findall(r"```(\w+)", README)) == {"python", "sh"}


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like the checkout and takes what the commands write."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("out", "build"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_block_runs(block, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    exec(compile(block, "README.md", "exec"), {})


@pytest.fixture(scope="module")
def adajudge():
    """The command; each of its processes does what the program does once it has imported everything."""
    with ForkingAdajudge() as server:
        yield server


@pytest.mark.parametrize("commands", COMMANDS, ids=range(len(COMMANDS)))
def test_a_blocks_commands_run_in_their_order(commands, checkout, adajudge):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables["PYTEST_ADDOPTS"] = "--within=5"  # seconds; of benchmarks, which take longer
    servers = []
    for command in commands:
        program, *arguments = shlex.split(command.removesuffix(" &"), comments=True)
        if program == "adajudge" and not command.endswith("&"):
            log = checkout / "log.txt"
            expected = 1 if arguments[:2] in _WITH_BAD_ROWS else 0
            assert adajudge.run(log, *arguments, folder=checkout) == expected, f"{command}: {log.read_text()}"
            continue
        if program == "make":  # the targets themselves are what a reader runs
            called = ["make", "-n", *arguments]
        elif program == "pip":
            options = ["--dry-run", "--no-deps", "--no-build-isolation"]
            called = [sys.executable, "-m", "pip", *arguments, *options]
        elif program == "adajudge":
            called = [sys.executable, "-m", "adajudge.cli", *arguments]
        elif program == "curl":
            called = ["curl", "--fail-with-body", *arguments]
        else:
            assert program == "python"
            called = [sys.executable, *arguments]
        if command.endswith("&"):
            servers.append(
                subprocess.Popen(called, cwd=checkout, stdout=subprocess.PIPE, text=True, env=variables)
            )
            assert servers[-1].stdout.readline().startswith("listening on")
            continue
        result = subprocess.run(
            called, cwd=checkout, capture_output=True, text=True, env=variables, check=False
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
    for server in servers:
        server.terminate()
        assert server.wait(60) == 0
        server.stdout.close()


def test_the_measured_tables_are_what_the_report_writes():
    results = sorted(ROOT.glob("benchmarks/results/*.json"))
    assert len([path for path in results if path.name.startswith("cpu-")]) == 1
    assert with_tables(README, tables(results)) == README
