"""Scoring jobs: killed at any moment and shared by any number of processes, the same bytes in the end."""

import gzip
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification, Scorer
from adajudge.cli import main
from adajudge.data import DataFileError, Message, Row
from adajudge.scoring import JobError, ScoringJob
from adajudge.scoring.parts import PartFolder
from adajudge.scoring.ranks import RankError, Ranks
from torch.distributed import HashStore
from transformers import Qwen3Config

from tests.adajudge.chat_templates.families import family_tokenizer
from tests.adajudge.forking_adajudge import ROOT, ForkingAdajudge

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "the", "moon", "while", "it", "rained"]
FORMATS = ("jsonl", "jsonl.gz", "json", "parquet")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Folder of a tiny judge whose head is random too."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    tokenizer = family_tokenizer("qwen3")
    backbone = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=96,
    )  # fmt: skip
    config = AdaJudgeConfig(
        backbone_config=backbone, num_blocks=1, expert_hidden_size=8, router_hidden_size=8
    )
    model = AdaJudgeForSequenceClassification(config)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def records(count, seed=0):
    """Pairs, single responses and candidates, and now and then a row that cannot be scored."""
    rng = random.Random(seed)

    def text():
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))

    for number in range(count):
        row = {"id": f"row-{number}", "prompt": text()}
        kind = rng.random()
        if kind < 0.02:
            yield row | {"response": "moon " * 99}  # does not fit
        elif kind < 0.04:
            yield row
        elif kind < 0.5:
            yield row | {"response": text()}
        elif kind < 0.8:
            yield row | {"chosen": text(), "rejected": text(), "domain": rng.choice("ab")}
        else:
            yield row | {"responses": [text() for _ in range(3)]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parts_of(output):
    return list(Path(f"{output}.parts").glob("*/*.part"))


def outputs(folder, name):
    """The bytes of everything that a job has left, by what its name has behind `name`."""
    found = {path.name.removeprefix(name): path for path in folder.iterdir() if path.name.startswith(name)}
    return {rest: path.read_bytes() for rest, path in found.items()}


@pytest.fixture(scope="module")
def adajudge():
    with ForkingAdajudge() as commands:
        yield commands


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupt jobs of this process, as Ctrl-C does, when they have written so many parts."""

    def score(parts, *arguments):
        write_part = PartFolder.write
        written = []

        def stop(self, index, part):
            if len(written) == parts:
                raise KeyboardInterrupt
            written.append(index)
            write_part(self, index, part)

        with monkeypatch.context() as patch:
            patch.setattr(PartFolder, "write", stop)
            return main(["score", *map(str, arguments)])

    return score


@pytest.fixture
def small(judge, tmp_path):
    """A command that scores 60 rows in 12 windows; OUT comes behind it."""
    source = write(tmp_path / "in.jsonl", records(60))
    return ["score", str(source), "--model", str(judge), "--window", "5", "--no-table", "--output"]


def without_speed(text):
    """What is printed at the end of a job, without its time and file."""
    lines = [line for line in text.splitlines() if not line.startswith(("written", "not scored"))]
    return [line.split(" in ")[0].split("; of these now")[0] for line in lines]


def test_killed_at_twenty_random_moments_a_job_ends_with_the_same_bytes(judge, adajudge, tmp_path):
    """`kill -9` of 5,000 rows, at moments measured by the work that is done: while starting, scoring and merging."""
    rng = random.Random(7)
    source = write(tmp_path / "in.jsonl", records(5000))
    log = tmp_path / "log"
    command = ["score", source, "--model", judge, "--window", 50, "--no-table", "--output"]
    assert adajudge.run(log, *command, tmp_path / "whole.jsonl.gz") == 1
    output = tmp_path / "killed.jsonl.gz"
    merged = Path(f"{output}.parts/merged")
    moments = [("starting", lambda: True)] * 2
    for parts in sorted(rng.sample(range(1, 98), 14)):  # of 100
        moments.append(("scoring", lambda parts=parts: len(parts_of(output)) >= parts))
    moments += [("merging", lambda: merged.exists() and merged.stat().st_mtime_ns > started)] * 4
    for phase, reached in moments:
        started = time.time_ns()
        process = adajudge.start(log, *command, output)
        while not reached() and not adajudge.has_ended(process):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3 if phase == "starting" else 0.03))
        assert adajudge.kill(process), f"ended before it was killed while {phase}: {log.read_text()[-2000:]}"
        assert not output.exists()
    assert adajudge.run(log, *command, output) == 1
    whole, killed = outputs(tmp_path, "whole"), outputs(tmp_path, "killed")
    assert whole == killed
    ids = [json.loads(line)["id"] for line in gzip.decompress(whole[".jsonl.gz"]).splitlines()]
    bad = [json.loads(line)["id"] for line in whole[".jsonl.gz.errors.jsonl"].splitlines()]
    assert sorted([*ids, *bad], key=lambda name: int(name[4:])) == [f"row-{i}" for i in range(5000)]
    assert ids == sorted(ids, key=lambda name: int(name[4:]))


@pytest.mark.parametrize("extension", FORMATS)
def test_an_interrupted_job_says_where_it_is_and_goes_on_in_every_format(
    small, interrupted, extension, tmp_path, capsys
):
    whole, output = tmp_path / f"whole.{extension}", tmp_path / f"out.{extension}"
    assert main([*small, str(whole)]) == 1
    expected = without_speed(capsys.readouterr().out)
    assert interrupted(4, *small[1:], output) == 130
    said = capsys.readouterr().err
    assert "interrupted" in said
    assert f"{output}.parts, and the same command goes on from there; {output} does not exist" in said
    assert len(parts_of(output)) == 4
    assert main([*small, str(output)]) == 1
    captured = capsys.readouterr()
    assert f"goes on from {output}.parts: 20 rows are scored already" in captured.err
    assert (
        without_speed(captured.out) == expected
    )  # quantiles, histogram, counts and accuracy are of all rows
    assert "of these now 40 rows" in captured.out
    ours = outputs(tmp_path, "out")
    assert ours == outputs(tmp_path, "whole")
    assert set(ours) == {f".{extension}", f".{extension}.errors.jsonl"}


def test_finished_windows_are_read_but_neither_encoded_nor_scored(small, interrupted, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    interrupted(7, *small[1:], output)
    encoded = []
    encode = Scorer.encode
    monkeypatch.setattr(Scorer, "encode", lambda self, row: encoded.append(row.line) or encode(self, row))
    assert main([*small, str(output)]) == 1
    assert encoded
    assert min(encoded) > 35


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--window", "6"], "window was 5, is 6"),
        (["--max_length", "90"], "max_length was 96, is 90"),
        (["--token-budget", "99"], "token_budget was 2048, is 99"),
        (["--truncate_response"], "truncate_response was False, is True"),
        (["--allow_unknown"], "unknown_limit was None, is 1.0"),
        (["--dtype", "bfloat16"], "dtype was 'float32', is 'bfloat16'"),
        (["--attn_implementation", "sdpa"], "attention was 'adajudge', is 'sdpa'"),
    ],
)
def test_a_job_that_was_asked_for_differently_is_refused_by_the_field(
    small, interrupted, options, field, tmp_path, capsys
):
    output = tmp_path / "out.jsonl"
    interrupted(3, *small[1:], output)
    assert main([*small, str(output), *options]) == 2
    said = capsys.readouterr().err
    assert field in said
    assert "--fresh begins anew" in said
    assert len(parts_of(output)) == 3
    if options[0] in ("--window", "--truncate_response"):
        assert main([*small, str(output), *options, "--fresh"]) in (0, 1)
        assert main([*small, str(tmp_path / "whole.jsonl"), *options]) in (0, 1)
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_job_that_finished_nothing_leaves_nothing_to_go_on_with(small, interrupted, tmp_path):
    """Asked for with an option amiss, it fails early; the corrected command needs no --fresh."""
    output = tmp_path / "out.jsonl"
    interrupted(0, *small[1:], output, "--truncate_response")
    assert not Path(f"{output}.parts").exists()
    interrupted(1, *small[1:], output, "--truncate_response")
    for part in parts_of(output):
        part.unlink()  # as after a kill before the first
    assert main([*small, str(output)]) == 1
    assert main([*small, str(tmp_path / "whole.jsonl")]) == 1
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def change_weights(folder):
    model = AdaJudgeForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.backbone.layers[0].mlp.down_proj.weight[3, 3] += 1e-3
    model.save_pretrained(folder)


def change_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text("{# another #}" + path.read_text())


def change_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"causal_refinement": False}))


@pytest.mark.parametrize(
    ("change", "field"),
    [(change_weights, "weights was"), (change_template, "tokenizer was"), (change_config, "config was")],
)
def test_another_judge_under_the_same_name_is_refused(judge, interrupted, change, field, tmp_path, capsys):
    folder = shutil.copytree(judge, tmp_path / "judge")
    source = write(tmp_path / "in.jsonl", records(20))
    command = [source, "--model", folder, "--window", 5, "--output", tmp_path / "out.jsonl"]
    interrupted(2, *command)
    change(folder)
    assert main(["score", *map(str, command)]) == 2
    assert field in capsys.readouterr().err


def test_a_judge_and_an_input_that_only_moved_are_the_same(judge, interrupted, small, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    interrupted(3, *small[1:], output)
    source = tmp_path / "moved.jsonl.gz"
    source.write_bytes(gzip.compress(Path(small[1]).read_bytes()))
    folder = shutil.copytree(judge, tmp_path / "moved")
    moved = ["score", str(source), "--model", str(folder), *small[4:]]
    assert main([*moved, str(output)]) == 1
    assert "15 rows are scored already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows[0] | {"id": "other"}, *rows[1:]], "rows 1 to 5 are not those that were scored"),
        (lambda rows: [*rows[:9], rows[9] | {"prompt": "moon"}, *rows[10:]], "rows 6 to 10 are not those"),
        (lambda rows: rows[1:], "rows 1 to 5 are not those"),
        (lambda rows: rows[:5], "it ends at row 5, but rows behind that were scored before"),
    ],
)
def test_other_rows_than_those_that_were_scored_are_refused(
    small, interrupted, change, message, tmp_path, capsys
):
    output = tmp_path / "out.jsonl"
    interrupted(3, *small[1:], output)
    write(Path(small[1]), change(list(records(60))))
    assert main([*small, str(output)]) == 2
    assert f"input: {message}" in capsys.readouterr().err
    assert main([*small, str(output), "--fresh"]) in (0, 1)


def test_rows_that_nobody_has_scored_yet_may_change(small, interrupted, tmp_path):
    """A broken file is mended, or grows, and its job goes on."""
    output = tmp_path / "out.jsonl"
    interrupted(3, *small[1:], output)
    write(Path(small[1]), [*records(20), {"prompt": "the", "response": "cat"}])
    assert main([*small, str(output)]) == 0
    assert main([*small, str(tmp_path / "whole.jsonl")]) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_standard_input_goes_on_when_the_same_rows_come_again(small, interrupted, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    command = [small[0], "-", *small[2:]]
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", open(small[1]))  # noqa: SIM115
        code = interrupted(3, *command[1:], output) if not parts_of(output) else main([*command, str(output)])
    assert code == 1
    assert main([*small, str(tmp_path / "whole.jsonl")]) == 1
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_folder_that_no_job_made_is_left_alone(small, tmp_path, capsys):
    folder = tmp_path / "out.jsonl.parts"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert main([*small, str(tmp_path / "out.jsonl"), "--fresh"]) == 2
    assert "it holds 'thesis.tex'" in capsys.readouterr().err
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_damaged_part_is_named_and_made_again_when_it_is_removed(small, interrupted, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    interrupted(3, *small[1:], output)
    damaged = sorted(parts_of(output))[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert main([*small, str(output)]) == 2
    assert f"{damaged}: not a whole part" in capsys.readouterr().err
    damaged.unlink()
    assert main([*small, str(output)]) == 1
    assert main([*small, str(tmp_path / "whole.jsonl")]) == 1
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_two_jobs_for_one_output_at_once_are_refused(judge, tmp_path):
    scorer = Scorer.from_pretrained(judge)
    with ScoringJob(scorer, tmp_path / "out.jsonl"), pytest.raises(JobError, match="another process"):
        ScoringJob(scorer, tmp_path / "out.jsonl").__enter__()


def test_a_refused_job_lets_go_of_its_lock(judge, small, interrupted, tmp_path):
    """What the message advises can be followed while the error is still at hand."""
    output = tmp_path / "out.jsonl"
    interrupted(1, *small[1:], output)
    scorer = Scorer.from_pretrained(judge, window=4)
    refused = ScoringJob(scorer, output)
    errors = []
    for _ in range(2):
        with pytest.raises(JobError, match=r"window was 5, is 4.*--fresh") as error:
            refused.__enter__()
        errors.append(error.value)
    with ScoringJob(scorer, output, fresh=True) as job:
        assert job.resumed == set()
    assert len(errors) == 2


def test_a_rank_that_differs_lets_go_of_its_lock(judge, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    job = ScoringJob(Scorer.from_pretrained(judge), output)
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "from_first", lambda self, make: make() | {"asked": {"window": 4}})
        with pytest.raises(JobError, match="were asked for different things"):
            job.__enter__()
    with ScoringJob(Scorer.from_pretrained(judge), output):
        pass


def test_a_job_from_python(judge, tmp_path):
    rows = [Row(str(i), i, "single", (Message("user", "the cat"),), ("sat",)) for i in range(1, 12)]
    with ScoringJob(Scorer.from_pretrained(judge, window=4), tmp_path / "out.jsonl") as job:
        with pytest.raises(RuntimeError, match="before run"):
            job.merge()
        job.run(rows)
        job.merge()
    assert (job.rows_passed, job.rows_scored, job.rows_resumed) == (11, 11, 0)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 11
    with pytest.raises(DataFileError, match="unknown extension"):
        ScoringJob(Scorer.from_pretrained(judge), tmp_path / "out.csv")


def test_the_command_killed_and_run_again(judge, tmp_path):
    """The command as a user starts it, in a process of its own."""
    source = write(tmp_path / "in.jsonl", records(600))
    output = tmp_path / "out.jsonl"
    command = ["score", str(source), "--model", str(judge), "--window", "10", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
    process = subprocess.Popen([sys.executable, "-m", "adajudge.cli", *command], cwd=ROOT, env=environment)
    while len(parts_of(output)) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 <= len(parts_of(output)) < 60
    assert main(command) == 1
    assert main([*command[:-1], str(tmp_path / "whole.jsonl")]) == 1
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def start_ranks(adajudge, log, *commands):
    """Processes as torchrun starts them, with a command each; the first one keeps the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        adajudge.start(log, *command, **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, command in enumerate(commands)
    ]


def test_any_number_of_processes_goes_on_with_what_another_number_began(
    small, adajudge, interrupted, tmp_path
):
    assert main([*small, str(tmp_path / "whole.jsonl")]) == 1
    log = tmp_path / "log"
    interrupted(2, *small[1:], tmp_path / "a.jsonl")
    processes = start_ranks(adajudge, log, *[[*small, tmp_path / "a.jsonl"]] * 3)
    assert [adajudge.wait(process) for process in processes] == [1, 0, 0], log.read_text()
    assert outputs(tmp_path, "a") == outputs(tmp_path, "whole")
    assert "10 rows are scored already" in log.read_text()
    assert "; of these now 50 rows in" in log.read_text()  # by all of them


def test_two_processes_killed_and_one_goes_on(judge, adajudge, tmp_path, capsys):
    source, log = write(tmp_path / "in.jsonl", records(600)), tmp_path / "log"
    command = ["score", str(source), "--model", str(judge), "--window", "10", "--no-table", "--output"]
    output = tmp_path / "out.jsonl"
    processes = start_ranks(adajudge, log, *[[*command, output]] * 2)
    while len(parts_of(output)) < 12 and not adajudge.has_ended(processes[0]):
        time.sleep(0.002)
    killed = [adajudge.kill(process) for process in processes]
    assert killed == [True, True], log.read_text()
    done = {int(path.stem) for path in parts_of(output)}
    assert {0, 1} <= done  # the first of each process: both had their share
    assert main([*command, str(output)]) == 1
    assert f"{10 * len(done)} rows are scored already" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "whole.jsonl")]) == 1
    assert outputs(tmp_path, "out") == outputs(tmp_path, "whole")


def test_a_rank_that_was_asked_for_something_else_stops_all(small, adajudge, tmp_path):
    log = tmp_path / "log"
    command = [*small, tmp_path / "out.jsonl"]
    processes = start_ranks(adajudge, log, command, [*command, "--max_length", "50"])
    assert [adajudge.wait(process) for process in processes] == [2, 2]
    assert "rank 0 and rank 1 were asked for different things: max_length was 96, is 50" in log.read_text()
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_before_the_job_begins_stops_all(small, rank, monkeypatch, tmp_path, capsys):
    """Loading the judge fails in one of two processes; the other one is told, wherever it waits."""
    store = HashStore()
    monkeypatch.setattr(Ranks, "from_environment", lambda: Ranks(rank, 2, store=store))
    assert main([*small, str(tmp_path / "out.jsonl"), "--model", "nowhere"]) == 2
    reason = "nowhere: no config.json there"
    assert reason in capsys.readouterr().err
    other = Ranks(1 - rank, 2, store=store)
    other.finish()
    with pytest.raises(RankError, match=f"rank {rank}: .*{reason}"):
        other.wait_for_others(lambda: pytest.fail("it was not told"))
    if rank == 0:
        assert store.check(["made"])
        with pytest.raises(RankError, match=f"rank 0: .*{reason}"):
            other.from_first(lambda: None)


def test_torchrun_is_not_told_to_restart_a_finished_job(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main([*small, str(tmp_path / "out.jsonl")]) == 0
    assert "exit code 0 although rows are in the error file" in capsys.readouterr().err


def test_several_processes_cannot_share_standard_input(small, monkeypatch, capsys):
    monkeypatch.setattr(Ranks, "from_environment", lambda: Ranks(0, 2))
    assert main(["score", "-", *small[2:], "out.jsonl"]) == 2
    assert "2 processes cannot share standard input or output" in capsys.readouterr().err


def test_torchrun_gives_the_bytes_of_a_single_process(judge, tmp_path):
    source = write(tmp_path / "in.jsonl", records(200))
    command = [str(source), "--model", str(judge), "--window", "10", "--output"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
         "-m", "adajudge.cli", "score", *command, str(tmp_path / "shared.jsonl")],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # rows that cannot be scored
    assert main(["score", *command, str(tmp_path / "alone.jsonl")]) == 1
    assert outputs(tmp_path, "shared") == outputs(tmp_path, "alone")
    assert len(outputs(tmp_path, "shared")) == 2
