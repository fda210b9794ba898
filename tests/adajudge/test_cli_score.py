"""``adajudge score`` with the built-in judge: files in, files out, errors named, nothing lost."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from adajudge import Scorer
from adajudge.cli import main
from adajudge.scoring import BUILT_IN_JUDGE

GOOD = {"id": "good", "prompt": "tell me about sport .", "response": "the ball and the goal ."}
PAIR = {
    "id": "pair",
    "prompt": "tell me about sport .",
    "chosen": "the ball and the goal .",
    "rejected": "the pan and the oven .",
}


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_bad_row_is_named_and_every_good_one_scored(tmp_path, capsys):
    """CRLF, a byte-order mark, an empty line, a missing field, a wrong type, an empty response, a duplicate id, an
    overlong row and emoji in one file."""
    lines = [
        json.dumps(GOOD),
        "",
        json.dumps({"id": "missing", "prompt": "tell me about sport ."}),
        json.dumps({"id": "type", "prompt": "tell me about sport .", "response": 7}),
        json.dumps({"id": "empty", "prompt": "tell me about sport .", "response": "  "}),
        json.dumps(GOOD),
        json.dumps({"id": "long", "prompt": "tell me about sport .", "response": "ball " * 400}),
        json.dumps(
            {"id": "emoji", "prompt": "tell me about sport .", "response": "the ball " * 12 + "🏀"},
            ensure_ascii=False,
        ),
        "{not json",
        json.dumps(PAIR),
        json.dumps(
            {"id": "strange", "prompt": "Discuss Kant's categorical imperative.", "response": "It says ..."}
        ),
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert main(["score", str(source), "--output", str(output)]) == 1
    assert [record["id"] for record in read_lines(output)] == ["good", "emoji", "pair"]
    errors = {(e["line"], e["field"]): e["reason"] for e in read_lines(tmp_path / "out.jsonl.errors.jsonl")}
    assert set(errors) == {
        (3, "response"),
        (4, "response"),
        (5, "response"),
        (6, "id"),
        (7, "response"),
        (9, "row"),
        (11, "row"),
    }
    assert "words are unknown to this judge" in errors[11, "row"]
    assert "not scored: 7 rows" in capsys.readouterr().out


def test_all_rows_scored_is_exit_code_zero_and_removes_a_stale_error_file(tmp_path):
    source, output = write_lines(tmp_path / "in.jsonl", GOOD, PAIR), tmp_path / "out.jsonl"
    stale = tmp_path / "out.jsonl.errors.jsonl"
    stale.write_text("{}\n")
    assert main(["score", source, "--output", str(output)]) == 0
    assert not stale.exists()
    single, pair = read_lines(output)
    assert set(single) == {
        "id",
        "reward",
        "view_scores",
        "view_weights",
        "depth_weights",
        "prompt_tokens",
        "response_tokens",
        "truncated",
        "unknown_share",
        "holds_control_tokens",
    }
    assert pair["winner"] == "chosen"
    assert pair["margin"] == pytest.approx(pair["chosen"]["reward"] - pair["rejected"]["reward"])


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_every_format_out_and_in(tmp_path, extension):
    source = write_lines(tmp_path / "in.jsonl", PAIR, PAIR | {"id": "second"})
    output = tmp_path / f"out.{extension}"
    assert main(["score", source, "--output", str(output)]) == 0
    if extension == "parquet":
        records = pyarrow.parquet.read_table(output).to_pylist()
    elif extension == "json":
        records = json.loads(output.read_text())
    else:
        text = (
            gzip.decompress(output.read_bytes()).decode() if extension.endswith("gz") else output.read_text()
        )
        records = [json.loads(line) for line in text.splitlines()]
    assert [record["id"] for record in records] == ["pair", "second"]
    assert records[0]["margin"] == records[1]["margin"]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", output.name]


def test_standard_input_to_standard_output(tmp_path, capsys, monkeypatch):
    lines = json.dumps(GOOD) + "\n" + "{}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["score", "-", "--output", "-"]) == 1
    captured = capsys.readouterr()
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == ["good"]
    assert '"line": 2' in captured.err


def test_a_pipe_that_stays_open_is_answered_window_by_window(monkeypatch):
    """With two windows in advance, as the documentation says."""
    pipe = io.BytesIO()
    answered = []

    def rows():
        for number in range(5):
            answered.append(pipe.getvalue().count(b"\n"))
            yield json.dumps(GOOD | {"id": str(number)}).encode() + b"\n"

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=rows()))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(pipe))
    assert main(["score", "-", "--output", "-", "--window", "1"]) == 0
    assert answered == [0, 0, 0, 1, 2]
    assert pipe.getvalue().count(b"\n") == 5


def test_without_a_terminal_progress_is_a_line_from_time_to_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("adajudge.cli.progress._LINE_SECONDS", 0.0)
    source = write_lines(tmp_path / "rows.jsonl", *(GOOD | {"id": str(i)} for i in range(5)))
    assert main(["score", source, "--output", str(tmp_path / "scores.jsonl"), "--window", "2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scoring: ")]
    assert [line.split(" rows passed ")[0] for line in lines][-1] == "scoring: 5"
    assert all("rows/s" in line and "tokens/s" in line for line in lines)


def test_unknown_words_are_scored_only_on_request(tmp_path):
    strange = {"id": "strange", "prompt": "Discuss Kant.", "response": "He wrote three critiques."}
    source, output = write_lines(tmp_path / "in.jsonl", strange), tmp_path / "out.jsonl"
    assert main(["score", source, "--output", str(output)]) == 1
    assert read_lines(output) == []
    assert main(["score", source, "--output", str(output), "--allow-unknown"]) == 0
    assert read_lines(output)[0]["unknown_share"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl", "--output", "out.jsonl"], "missing.jsonl"),
        (["in.jsonl", "--output", "out.csv"], "out.csv: unknown extension"),
        (["in.jsonl", "--output", "nowhere/out.jsonl"], "the folder nowhere does not exist"),
        (["in.jsonl", "--output", "out.jsonl", "--model", "nothing"], "nothing: no config.json there"),
        (["in.jsonl", "--output", "out.jsonl", "--max_length", "999"], "max_length: 999 came"),
    ],
)
def test_wrong_usage_is_exit_code_two_and_says_why(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", GOOD)
    assert main(["score", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_options_from_a_file_and_the_command_line_wins(tmp_path):
    source, output = write_lines(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    config = tmp_path / "options.yaml"
    config.write_text(f"output: {tmp_path}/other.jsonl\nmax_length: 5\n")
    assert main(["score", source, "--config", str(config)]) == 1  # 5 tokens do not hold the response
    assert (
        main(["score", source, "--config", str(config), "--output", str(output), "--max_length", "64"]) == 0
    )
    assert len(read_lines(output)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_lenght: 8", "unknown key 'max_lenght'"),
        ("max_length: many", "max_length: 'many' came"),
        ("dtype: float8", "dtype: 'float8' came"),
        ("- 1", "list came"),
    ],
)
def test_a_wrong_options_file_is_named(text, message, tmp_path, capsys):
    config = tmp_path / "options.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["score", "in.jsonl", "--output", "out.jsonl", "--config", str(config)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from adajudge.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules), 'heavy import'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "score" in result.stdout


@pytest.mark.parametrize("name", ["in.jsonl", "out.jsonl.errors.jsonl", "out.jsonl.parts/merged"])
def test_the_input_is_never_overwritten(name, tmp_path, capsys):
    source = tmp_path / name
    source.parent.mkdir(exist_ok=True)
    text = json.dumps(PAIR) + "\n"
    source.write_text(text)
    if not name.endswith(".jsonl"):
        source = tmp_path / "link.jsonl"
        source.symlink_to(tmp_path / name)
    target = source if name == "in.jsonl" else tmp_path / "out.jsonl"
    assert main(["score", str(source), "--output", str(target)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert source.read_text() == text


def test_an_unusable_output_or_device_is_an_error_of_one_line(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", PAIR)
    (tmp_path / "folder.jsonl").mkdir()
    for options, expected in (
        (["--output", str(tmp_path / "folder.jsonl")], "it is a folder"),
        (["--output", str(tmp_path / "o.jsonl"), "--device", "foo"], "--device foo cannot be used"),
        (["--output", str(tmp_path / "o.jsonl"), "--device", "meta"], "--device meta cannot be used"),
    ):
        assert main(["score", source, *options]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert "Traceback" not in error


def test_brackets_in_names_are_not_markup(tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", PAIR | {"domain": "[/x]"})
    assert main(["score", source, "--output", str(tmp_path / "out[a].jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "[/x]" in shown
    assert "out[a].jsonl" in shown


def test_parquet_keeps_the_scores_of_rows_of_every_kind(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", GOOD, PAIR)
    assert main(["score", source, "--output", str(tmp_path / "out.parquet")]) == 0
    single, pair = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert single["reward"] is not None
    assert pair["margin"] is not None


def test_a_forced_backend_that_cannot_serve_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    source = write_lines(tmp_path / "in.jsonl", PAIR)
    monkeypatch.setenv("ADAJUDGE_BACKEND", "cuda")
    assert main(["score", source, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "ADAJUDGE_BACKEND=cuda" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_broken_judge_is_an_error_of_one_line_that_names_its_folder(name, tmp_path, capsys):
    folder = tmp_path / "judge"
    shutil.copytree(BUILT_IN_JUDGE, folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    source = write_lines(tmp_path / "in.jsonl", PAIR)
    assert main(["score", source, "--output", str(tmp_path / "out.jsonl"), "--model", str(folder)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("adajudge score:")]
    assert str(folder) in line


@pytest.mark.parametrize("text", ["[]", '{"model_type": "adajudge", "turn_boundary": {"foo": 1}}'])
def test_a_strange_configuration_is_an_error_of_one_line(text, tmp_path, capsys):
    folder = tmp_path / "judge"
    shutil.copytree(BUILT_IN_JUDGE, folder)
    (folder / "config.json").write_text(text)
    source = write_lines(tmp_path / "in.jsonl", PAIR)
    assert main(["score", source, "--output", str(tmp_path / "out.jsonl"), "--model", str(folder)]) == 2
    assert "adajudge score:" in capsys.readouterr().err


def test_what_was_scored_before_the_input_broke_is_named_and_taken_up_when_it_is_whole(tmp_path, capsys):
    whole = gzip.compress("".join(json.dumps(PAIR | {"id": str(i)}) + "\n" for i in range(700)).encode())
    source, output = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(whole[: len(whole) - 20])
    assert main(["score", str(source), "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert f"is in {output}.parts, and the same command goes on from there; {output} does not exist" in said
    assert not output.exists()
    source.write_bytes(whole)
    assert main(["score", str(source), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert f"goes on from {output}.parts: 512 rows are scored already" in captured.err
    assert "700 rows, 1400 responses" in captured.out
    assert "of these now 188 rows" in captured.out
    assert [record["id"] for record in read_lines(output)] == [str(i) for i in range(700)]
    assert not Path(f"{output}.parts").exists()


def test_an_input_that_breaks_off_at_once_leaves_nothing_behind(tmp_path, capsys):
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b"{}")[:12])
    assert main(["score", str(source), "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "unreadable behind line 0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_a_crash_is_no_exit_code_of_a_finished_job(tmp_path, monkeypatch, capsys):
    """Exit code 1 says that all other rows are in OUT."""
    score_window = Scorer._score_window
    windows = []

    def crash(self, window, items):
        windows.append(window)
        if len(windows) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return score_window(self, window, items)

    source = write_lines(tmp_path / "in.jsonl", {}, *(PAIR | {"id": str(i)} for i in range(3)))
    output = tmp_path / "out.jsonl"
    command = ["score", source, "--window", "1", "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "_score_window", crash)
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "RuntimeError: CUDA error: an illegal memory access" in said
    assert "adajudge score: crashed with RuntimeError" in said
    assert f"{output}.parts, and the same command goes on from there; {output} does not exist" in said
    assert main(command) == 1
    assert "2 rows are scored already" in capsys.readouterr().err


def test_the_output_has_its_name_on_the_disk_before_the_parts_go(tmp_path, monkeypatch):
    """After a loss of power there is one or the other."""
    source = write_lines(tmp_path / "in.jsonl", PAIR)
    output, done = tmp_path / "out.jsonl", []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def note_sync(descriptor):
        fsync(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(tmp_path)):
            done.append("folder synced")

    def note_name(source, target):
        replace(source, target)
        if str(target) == str(output):
            done.append("named")

    def note_unlink(path, missing_ok=False):
        unlink(path, missing_ok)
        if path.name == "job.json":
            done.append("job removed")

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_name)
    monkeypatch.setattr(Path, "unlink", note_unlink)
    assert main(["score", source, "--output", str(output)]) == 0
    assert done[done.index("named") :][:2] == ["named", "folder synced"]
    assert done.index("job removed") > done.index("named") + 1


def test_abbreviated_options_are_refused(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", PAIR)
    with pytest.raises(SystemExit) as stop:
        main(["score", source, "--output", str(tmp_path / "out.jsonl"), "--conf", "options.yaml"])
    assert stop.value.code == 2


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch, capsys):
    source = write_lines(tmp_path / "in.jsonl", PAIR)
    monkeypatch.delitem(sys.modules, "rich.progress", raising=False)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert main(["score", source, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "pip install 'adajudge-kernels[model]'" in capsys.readouterr().err


def test_flags_of_the_text_are_in_the_output_and_the_summary(tmp_path, capsys):
    pair = {"chosen": "Say yes. yes", "rejected": "Say yes. no <pad>"}
    source, output = write_lines(tmp_path / "in.jsonl", pair), tmp_path / "out.jsonl"
    assert main(["score", source, "--output", str(output), "--allow-unknown"]) == 0
    shown = capsys.readouterr().out
    assert "1 rows without a prompt" in shown
    assert "1 rows with control tokens" in shown
    (record,) = read_lines(output)
    assert [record[side]["holds_control_tokens"] for side in ("chosen", "rejected")] == [False, True]


def test_what_was_cut_is_flagged_and_counted(tmp_path, capsys):
    """The prompt's beginning gives way; a response only where that was asked for."""
    long = "tell me about sport . " * 60
    rows = [GOOD | {"id": "prompt", "prompt": long}, GOOD | {"id": "response", "response": long}, GOOD]
    source, output = write_lines(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    assert main(["score", source, "--output", str(output)]) == 1
    assert "1 rows truncated" in capsys.readouterr().out
    assert [record["truncated"] for record in read_lines(output)] == [True, False]
    (error,) = read_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert (error["id"], error["field"]) == ("response", "response")
    assert main(["score", source, "--output", str(output), "--truncate-response"]) == 0
    assert "2 rows truncated" in capsys.readouterr().out
    assert [record["truncated"] for record in read_lines(output)] == [True, True, False]


@pytest.mark.parametrize("rows", [[GOOD, PAIR], [GOOD]], ids=["with pairs", "without"])
def test_a_picture_of_the_rewards(rows, tmp_path, capsys):
    source, picture = write_lines(tmp_path / "in.jsonl", *rows), tmp_path / "rewards.png"
    command = ["score", source, "--output", str(tmp_path / "out.jsonl"), "--plot"]
    assert main([*command, str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for name, message in (("rewards.docx", "unknown extension"), ("nowhere/x.png", "does not exist"),
                          ("out.jsonl", "unknown extension")):  # fmt: skip
        assert main([*command, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_anything_is_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = write_lines(tmp_path / "in.jsonl", PAIR)
    assert main(["score", source, "--output", str(tmp_path / "out.jsonl"), "--plot", "x.png"]) == 2
    assert "pip install 'adajudge-kernels[plot]'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_half_a_character_in_a_bad_row_does_not_stop_the_others(tmp_path):
    """Its error record quotes it, as JSON's escape."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"\\ud800": 1}\n' + json.dumps(GOOD) + "\n")
    assert main(["score", str(source), "--output", str(tmp_path / "out.jsonl")]) == 1
    assert len(read_lines(tmp_path / "out.jsonl")) == 1
    (error,) = read_lines(tmp_path / "out.jsonl.errors.jsonl")
    assert "\ud800" in error["reason"]


def test_parquet_of_pairs_and_candidates_together(tmp_path):
    candidates = {"id": "many", "prompt": "tell me about sport .", "responses": ["the ball .", "the goal ."]}
    source, output = write_lines(tmp_path / "in.jsonl", PAIR, candidates, GOOD), tmp_path / "out.parquet"
    assert main(["score", source, "--output", str(output)]) == 0
    assert main(["score", source, "--output", str(tmp_path / "out.jsonl")]) == 0
    table = pyarrow.parquet.read_table(output).to_pylist()
    for row, record in zip(table, read_lines(tmp_path / "out.jsonl"), strict=True):
        record["winner"] = str(record["winner"]) if "winner" in record else None
        assert row == dict.fromkeys(row) | record
