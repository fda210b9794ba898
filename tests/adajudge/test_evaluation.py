"""Benchmarks: figures as their makers define them, recomputed here row by row; rows that cannot count are named."""

import json
import math
import random
import tracemalloc

import numpy as np
import pytest
from adajudge import Scorer
from adajudge.cli import main
from adajudge.data import RowError
from adajudge.evaluation import BENCHMARKS, Figure, evaluate
from adajudge.evaluation.intervals import drawn_means
from adajudge.scoring import Score, ScoredRow

STYLES = range(3)


class Reader:
    """A judge whose reward is the number that a response consists of."""

    def score(self, rows):
        for row in rows:
            yield row if isinstance(row, RowError) else ScoredRow(row, tuple(map(self._score, row.responses)))

    @staticmethod
    def _score(text):
        return Score(float(text), (0.0,) * 3, (1 / 3,) * 3, (1.0,), 1, 1, False, 0.0, False)


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def number(rng):
    return str(rng.randint(0, 6))  # few values: ties happen


def value(evaluation, group, title="accuracy"):
    return (evaluation.figures | evaluation.totals)[group][title].value


def rm_bench(rng, count=40):
    domains = ("chat", "math", "code", "safety-refuse", "safety-response")
    return [
        {"id": i, "prompt": f"p{i}", "domain": domains[i % 5], "chosen": [number(rng) for _ in STYLES],
         "rejected": [number(rng) for _ in STYLES]}
        for i in range(count)
    ]  # fmt: skip


def test_rm_bench(tmp_path):
    records = rm_bench(random.Random(0))
    evaluation = evaluate(Reader(), [written(tmp_path / "rm.jsonl", records)])
    assert evaluation.benchmark == "rm-bench"
    assert evaluation.rows == {"chat": 8, "math": 8, "code": 8, "safety": 16}
    means = {"hard": [], "normal": [], "easy": []}
    for domain in ("chat", "math", "code", "safety"):
        wins = {"hard": [], "normal": [], "easy": []}
        for record in (r for r in records if r["domain"].startswith(domain)):
            for i in STYLES:
                for j in STYLES:
                    kind = "hard" if i < j else "normal" if i == j else "easy"
                    wins[kind].append(float(record["chosen"][i]) > float(record["rejected"][j]))
        for kind, values in wins.items():
            means[kind].append(100 * sum(values) / len(values))
            assert value(evaluation, domain, kind) == pytest.approx(means[kind][-1])
        average = sum(means[kind][-1] for kind in means) / 3
        assert value(evaluation, domain, "average") == pytest.approx(average)
    for kind, values in means.items():
        assert value(evaluation, "overall", kind) == pytest.approx(sum(values) / 4)


def test_the_domain_of_a_file_of_one(tmp_path):
    records = [{k: v for k, v in r.items() if k != "domain"} for r in rm_bench(random.Random(1), 6)]
    others = [{**r, "prompt": "other"} for r in records]
    files = [
        written(tmp_path / "code_filtered.jsonl", records),
        written(tmp_path / "safety-refuse.jsonl", others),
    ]
    evaluation = evaluate(Reader(), files)
    assert evaluation.rows == {"code": 6, "safety": 6}
    assert set(evaluation.totals) == {"mean of 2"}  # not overall: two domains are not there
    named = evaluate(Reader(), [written(tmp_path / "x.jsonl", records)], domain="math")
    assert named.rows == {"math": 6}
    for name in (
        "encoder.jsonl",
        "chat_without_math.jsonl",
    ):  # the one says nothing of code, the other too much
        with pytest.raises(ValueError, match=r"'domain': None"):
            evaluate(Reader(), [written(tmp_path / name, records)])
    with pytest.raises(
        ValueError, match=r"no row could be scored; .* field 'domain': None; expected one of chat"
    ):
        evaluate(Reader(), [written(tmp_path / "x.jsonl", records)])


def test_judge_bench(tmp_path):
    rng = random.Random(2)
    sources = ("mmlu-pro-law", "mmlu-pro-math", "livebench-math", "livebench-reasoning", "livecodebench")
    records = [
        {"pair_id": str(i), "source": sources[i % 5], "question": f"q{i}", "response_A": number(rng),
         "response_B": number(rng), "label": rng.choice(["A>B", "B>A"])}
        for i in range(60)
    ]  # fmt: skip
    evaluation = evaluate(Reader(), [written(tmp_path / "judge.jsonl", records)])
    right = [
        (float(r["response_A"]) > float(r["response_B"])) == (r["label"] == "A>B") for r in records
    ]  # a tie says B>A
    assert evaluation.benchmark == "judge-bench"
    assert evaluation.rows["mmlu-pro"] == 24
    assert value(evaluation, "mmlu-pro") == pytest.approx(
        100 * np.mean([x for x, r in zip(right, records, strict=True) if "mmlu" in r["source"]])
    )
    assert value(evaluation, "overall") == pytest.approx(100 * np.mean(right))
    groups = [value(evaluation, group) for group in evaluation.rows]
    assert value(evaluation, "mean of 4 groups") == pytest.approx(np.mean(groups))


def reward_bench_2(rng, numbers=25):
    subsets = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    records = [
        {"id": str(i), "subset": subsets[i % 5], "prompt": f"p{i}", "num_correct": 1, "chosen": [number(rng)],
         "rejected": [number(rng) for _ in STYLES]}
        for i in range(50)
    ]  # fmt: skip
    for i in range(numbers):
        for kind, correct in (("ref", 1), ("tied", 3)):
            right, wrong = ([str(rng.randint(low, 6)) for _ in range(n)] for low, n in ((3, correct), (0, 3)))
            records.append({"id": f"{kind}:{i}", "subset": "Ties", "prompt": "p", "num_correct": correct,
                            "chosen": right, "rejected": wrong})  # fmt: skip
    return records


def test_reward_bench_2(tmp_path):
    records = reward_bench_2(random.Random(3))
    evaluation = evaluate(Reader(), [written(tmp_path / "two.jsonl", records)])
    assert evaluation.benchmark == "reward-bench-2"
    scores = []
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        points = []
        for record in (r for r in records if r["subset"] == subset):
            rewards = [float(x) for x in record["chosen"] + record["rejected"]]
            best = [i for i, reward in enumerate(rewards) if reward == max(rewards)]
            points.append(1 / len(best) if 0 in best else 0)
        scores.append(100 * sum(points) / len(points))
        assert value(evaluation, subset, "score") == pytest.approx(scores[-1])
    ties = [r for r in records if r["subset"] == "Ties"]
    gap, spread, accurate = {}, {}, {"ref": [], "tied": []}
    for record in ties:
        right, wrong = ([float(x) for x in record[side]] for side in ("chosen", "rejected"))
        gap[record["id"]], spread[record["id"]] = min(right) - max(wrong), max(right) - min(right)
        accurate[record["id"].split(":")[0]].append(min(right) > max(wrong))
    terms = [[], [], []]
    for i in range(25):
        least, wide = min(gap[f"ref:{i}"], gap[f"tied:{i}"]), spread[f"tied:{i}"]
        terms[0].append(gap[f"tied:{i}"] > wide)
        terms[1].append(least > wide)
        if wide:
            terms[2].append(math.tanh(least / wide - 1))
        else:
            terms[2].append(math.copysign(1, least) if least else 0)
    assert {0.0} < set(spread.values())  # the case without a spread is there, and others
    parts = [np.mean(x) for x in (accurate["tied"], accurate["ref"], *terms)]
    expected = 100 * sum(w * x for w, x in zip((0.3, 0.3, 0.2, 0.2, 0.01), parts, strict=True))
    assert value(evaluation, "Ties", "score") == pytest.approx(expected)
    assert value(evaluation, "overall", "score") == pytest.approx((sum(scores) + expected) / 6)


def test_ties_without_their_references_have_no_score(tmp_path):
    records = [r for r in reward_bench_2(random.Random(5)) if not r["id"].startswith("ref")]
    evaluation = evaluate(Reader(), [written(tmp_path / "two.jsonl", records)])
    assert math.isnan(value(evaluation, "Ties", "score"))
    assert not math.isnan(value(evaluation, "mean of 5", "score"))
    assert evaluation.rows["Ties"] == 25
    figures = json.loads(json.dumps(evaluation.to_record(), allow_nan=False))["figures"]
    assert figures["Ties"]["score"] == {"value": None, "low": None, "high": None}


def draw_pairs(rng, count, share, prompts=None):
    """Pairs of which so many are right; each its own prompt, or of so many prompts whose pairs agree."""
    right = {}
    return [
        {"prompt": f"p{i % (prompts or count)}", "rejected": "0", "domain": "ab"[i % 2],
         "chosen": "1" if right.setdefault(i % (prompts or count), rng.random() < share) else "-1"}
        for i in range(count)
    ]  # fmt: skip


def test_the_width_of_an_interval(tmp_path):
    """Of one group it is that of a share of n; over all pairs that of twice as many."""
    records = draw_pairs(random.Random(4), 800, 0.7)
    evaluation = evaluate(Reader(), [written(tmp_path / "pairs.jsonl", records)])
    assert evaluation.benchmark == "pairs"
    figure, share = evaluation.figures["a"]["accuracy"], value(evaluation, "a") / 100
    half = 196 * math.sqrt(share * (1 - share) / 400)
    assert figure.high - figure.value == pytest.approx(half, rel=0.1)
    assert figure.value - figure.low == pytest.approx(half, rel=0.1)
    together = evaluation.totals["overall"]["accuracy"]
    assert together.value == pytest.approx((value(evaluation, "a") + value(evaluation, "b")) / 2)
    assert together.high - together.low == pytest.approx(2 * half / math.sqrt(2), rel=0.15)
    assert evaluate(Reader(), [tmp_path / "pairs.jsonl"]).totals == evaluation.totals


def test_rows_of_one_prompt_are_no_independent_samples(tmp_path):
    """Eight pairs of each of a hundred prompts that agree: what is known is of a hundred."""
    records = draw_pairs(random.Random(6), 800, 0.7, prompts=100)
    for record in records:
        record.pop("domain")
    evaluation = evaluate(Reader(), [written(tmp_path / "pairs.jsonl", records)])
    figure, share = evaluation.totals["overall"]["accuracy"], value(evaluation, "overall") / 100
    width = 2 * 196 * math.sqrt(share * (1 - share) / 100)
    assert figure.high - figure.low == pytest.approx(width, rel=0.1)


@pytest.mark.parametrize(("count", "share"), [(3, 0.9), (10, 0.9), (20, 0.95), (30, 0.5), (90, 0.65)])
def test_in_95_of_100_samples_the_interval_holds_the_truth(count, share):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        right = (rng.random((count, 1)) < share).astype(float)
        figure = Figure.of(drawn_means(right, range(count), np.zeros(1), np.ones(1), rng)[:, 0])
        held += figure.low <= 100 * share <= figure.high
    assert held / 300 > 0.9


def test_memory_does_not_grow_with_the_rows():
    right = (np.random.default_rng(0).random((200_000, 9)) < 0.7).astype(float)
    tracemalloc.start()
    means = drawn_means(right, range(len(right)), np.zeros(9), np.ones(9), np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert means[0] == pytest.approx(right.mean(axis=0))
    assert peak < 300e6


def test_ties_of_the_data_are_left_out_and_counted(tmp_path):
    context = [{"role": "user", "content": "q"}]
    records = [
        {"context": context, "response1": "1", "response2": "0", "overall_preference": x} for x in (-2, 0, 3)
    ]
    evaluation = evaluate(Reader(), [written(tmp_path / "help.jsonl", records)])
    assert (evaluation.rows, evaluation.ties) == ({"all": 2}, 1)
    assert value(evaluation, "all") == 50


RM = {"id": 1, "prompt": "p", "domain": "chat", "chosen": ["1", "1", "1"], "rejected": ["0", "0", "0"]}
JUDGE = {
    "pair_id": "x",
    "source": "livecodebench",
    "question": "q",
    "response_A": "1",
    "response_B": "0",
    "label": "A>B",
}
TWO = {"id": "ref:1", "subset": "Ties", "prompt": "p", "num_correct": 1, "chosen": ["1"], "rejected": ["0"]}


PAIR = {"id": 1, "prompt": "p", "chosen": "1", "rejected": "0"}


@pytest.mark.parametrize(
    ("sound", "change", "field", "reason"),
    [
        (RM, {"domain": "poetry"}, "domain", "'poetry'; expected one of chat, math, code, safety"),
        (RM, {"chosen": ["1", "1"]}, "chosen", "2 came, expected three responses"),
        (RM, {"chosen": "1"}, "chosen", "a str came, expected three responses"),
        (RM, {"rejected": ["0", "", "0"]}, "rejected[1]", "empty"),
        (RM, {"rejected": None}, "rejected", "missing; expected in every record of rm-bench (--benchmark)"),
        (RM, {"chosen": ["2"] * 3}, "id", "duplicate id '1': first at"),
        (JUDGE, {"label": "A=B"}, "label", "'A=B'; expected 'A>B' or 'B>A'"),
        (JUDGE, {"response_B": " "}, "response_B", "only white space"),
        (JUDGE, {"pair_id": None, "question": 3}, "question", "expected a string or a list of messages"),
        (JUDGE, {"pair_id": 1.5}, "pair_id", "expected a string or an integer"),
        (JUDGE, {"question": [{"role": "user"}]}, "question[0].content", "missing field"),
        (TWO, {"id": "7"}, "id", "'7'; expected 'ref:N' or 'tied:N' in Ties"),
        (TWO, {"id": "tied:1", "num_correct": 2}, "num_correct", "2, but chosen has 1"),
        (TWO, {"id": "tied:1", "rejected": []}, "rejected", "0 came, expected a list of at least one response"),
        (TWO, {"subset": "ties", "id": "3"}, "id", "expected 'ref:N' or 'tied:N' in Ties"),
        (TWO, {"subset": "Poetry"}, "subset", "'Poetry'; expected one of Factuality, Precise IF"),
        (TWO, {"subset": "Math", "num_correct": 2, "chosen": ["1", "2"]}, "num_correct", "2; expected 1 outside"),
        (PAIR, {"prompt": "q", "domain": "\ud800"}, "domain", "not valid text"),
        (PAIR, {"id": 1, "rejected": "7"}, "id", "duplicate id '1': first at"),
    ],
    ids=lambda x: None,
)  # fmt: skip
def test_a_row_that_cannot_count_is_named(tmp_path, sound, change, field, reason):
    path = written(tmp_path / "rows.jsonl", [sound, sound | change])
    evaluation = evaluate(Reader(), [path])
    assert sum(evaluation.rows.values()) == 1
    ((file, error),) = evaluation.errors
    assert file == str(path)
    assert (error.line, error.field) == (2, field)
    assert reason in error.reason
    if field != "pair_id":  # it is no id
        assert error.id == str((sound | change).get("pair_id" if sound is JUDGE else "id") or 2)


@pytest.mark.parametrize("broken", [{"chosen": None}, {"rejected": None}, {"chosen": "1"}])
def test_a_broken_first_record_does_not_hide_what_the_file_is(tmp_path, broken):
    records = [RM | broken, RM | {"id": 2}, RM | {"id": 3}]
    evaluation = evaluate(Reader(), [written(tmp_path / "rows.jsonl", records)])
    assert (evaluation.benchmark, evaluation.rows) == ("rm-bench", {"chat": 2})
    records = [{k: v for k, v in JUDGE.items() if k != "label"}, JUDGE | {"pair_id": "y"}]
    evaluation = evaluate(Reader(), [written(tmp_path / "rows.jsonl", records)])
    assert (evaluation.benchmark, evaluation.rows) == ("judge-bench", {"livecodebench": 1})
    assert set(evaluation.totals) == {"all rows", "mean of 1 groups"}


@pytest.mark.parametrize("record", [RM, JUDGE, TWO, PAIR, {k: v for k, v in PAIR.items() if k != "id"}])
def test_a_row_of_two_files_counts_once(tmp_path, record):
    files = [written(tmp_path / name, [record]) for name in ("a.jsonl", "b.jsonl")]
    evaluation = evaluate(Reader(), files)
    assert sum(evaluation.rows.values()) == 1
    ((file, error),) = evaluation.errors
    assert file == str(files[1])
    assert f"{files[0]} line 1" in error.reason


def test_pairs_of_two_files_have_ids_of_their_own(tmp_path):
    files = [written(tmp_path / f"{x}.jsonl", [PAIR | {"prompt": x}]) for x in "ab"]
    assert evaluate(Reader(), files).rows == {"all": 2}


def test_a_group_named_overall_stays_itself(tmp_path):
    records = [PAIR | {"id": i, "prompt": f"p{i}", "chosen": x, "domain": d}
               for i, (x, d) in enumerate([("1", "overall"), ("-1", "b"), ("-1", "b")])]  # fmt: skip
    evaluation = evaluate(Reader(), [written(tmp_path / "pairs.jsonl", records)])
    assert evaluation.figures["overall"]["accuracy"].value == 100
    assert evaluation.totals["overall"]["accuracy"].value == pytest.approx(100 / 3)


def test_ties_do_not_depend_on_how_their_subset_is_written(tmp_path):
    records = [r for r in reward_bench_2(random.Random(7)) if r["subset"] == "Ties"]
    expected = evaluate(Reader(), [written(tmp_path / "a.jsonl", records)]).figures
    shuffled = [r | {"subset": "ties", "id": r["id"].replace(":", ":0")} for r in records[::-1]]
    found = evaluate(Reader(), [written(tmp_path / "b.jsonl", shuffled)]).figures
    assert found["Ties"]["score"].value == pytest.approx(expected["Ties"]["score"].value)


def test_what_does_not_fit_together_is_refused_before_anything_is_scored(tmp_path):
    rm, judge = written(tmp_path / "a.jsonl", [RM]), written(tmp_path / "b.jsonl", [JUDGE])
    cases = (
        ([rm, judge], {}, "b.jsonl looks like judge-bench; expected files of one benchmark"),
        ([rm, tmp_path / "c.jsonl"], {}, "c.jsonl: no such file"),
        ([judge], {"domain": "math"}, "domain: 'math' came with judge-bench, expected with rm-bench only"),
        ([rm], {"domain": "poetry"}, "domain: 'poetry' came, expected one of safety-refuse"),
        ([rm], {"benchmark": "mt-bench"}, "benchmark: 'mt-bench' came, expected one of judge-bench"),
    )
    for files, options, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(None, files, **options)


@pytest.fixture
def examples(tmp_path):
    """RM-Bench's form in the words of the built-in judge."""
    from tests.test_readme import ROOT

    rows = [json.loads(line) for line in (ROOT / "examples/pairs.jsonl").open()]
    rows = [row for row in rows if row.get("chosen") and row.get("rejected")][:12]
    return written(
        tmp_path / "rm.jsonl",
        [{"id": i, "prompt": r["prompt"], "domain": r["domain"], "chosen": [r["chosen"]] * 3,
          "rejected": [r["rejected"], rows[(i + 1) % 12]["chosen"], r["chosen"]]} for i, r in enumerate(rows)],
    )  # fmt: skip


def test_the_command_line(examples, tmp_path, capsys):
    output, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    assert main(["eval", str(examples), "--output", str(output), "--plot", str(picture)]) == 0
    figures = json.loads(output.read_text())
    again = evaluate(Scorer.from_pretrained(), [examples])
    assert figures["rows"] == again.rows == {"chat": 2, "math": 10}
    hard = again.figures["math"]["hard"]
    assert figures["figures"]["math"]["hard"] == {"value": hard.value, "low": hard.low, "high": hard.high}
    assert figures["judge"]["weights"]
    assert str(hard) in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert (figures["truncated"], figures["with_control_tokens"]) == (0, 0)


def test_what_was_cut_is_said(tmp_path, capsys):
    rows = [
        {"prompt": "hello . " * 60 + str(i), "chosen": "the ball .", "rejected": "the goal ."}
        for i in range(3)
    ]
    path, output = written(tmp_path / "long.jsonl", rows), tmp_path / "figures.json"
    assert main(["eval", str(path), "--max_length", "40", "--allow_unknown", "--output", str(output)]) == 0
    assert "3 rows were cut to the judge's length" in capsys.readouterr().out
    assert json.loads(output.read_text())["truncated"] == 3


def test_figures_are_written_before_they_are_shown(examples, tmp_path, monkeypatch):
    output = tmp_path / "figures.json"

    def broken(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("rich.console.Console.print", broken)
    assert main(["eval", str(examples), "--output", str(output)]) != 0
    assert json.loads(output.read_text())["benchmark"] == "rm-bench"


def test_the_picture_has_the_figures(tmp_path, monkeypatch):
    """Bars as long as the figures, intervals around them, whatever the groups are named."""
    from adajudge.cli.figures_picture import save_picture
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure as Drawing

    drawn = []
    monkeypatch.setattr(Drawing, "savefig", lambda self, *_, **__: drawn.append(self))
    records = [PAIR | {"id": i, "prompt": f"p{i}", "chosen": "1" if i % 3 else "-1", "domain": ("$\\foo{$", "b")[i % 2]}
               for i in range(30)]  # fmt: skip
    evaluation = evaluate(Reader(), [written(tmp_path / "pairs.jsonl", records)])
    save_picture(tmp_path / "x.png", evaluation)
    (axes,) = drawn[0].axes
    figures = [*evaluation.figures.values(), *evaluation.totals.values()]
    assert [bar.get_width() for bar in axes.patches] == [x["accuracy"].value for x in figures]
    intervals = [x for x in axes.containers if isinstance(x, ErrorbarContainer)]
    for interval, columns in zip(intervals, figures, strict=True):
        ((start, end),) = (segment[:, 0] for segment in interval.lines[2][0].get_segments())
        assert (start, end) == pytest.approx((columns["accuracy"].low, columns["accuracy"].high))
    drawn[0].canvas.draw()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["$\\foo{$ (15)", "b (15)", "overall (30)"]


def test_the_command_line_knows_every_benchmark_and_domain():
    from adajudge.cli import evaluate as command
    from adajudge.evaluation.evaluation import DOMAINS

    assert set(command._NAMES) == set(BENCHMARKS)
    assert set(command._DOMAINS) == set(DOMAINS)


def test_exit_codes(examples, tmp_path, capsys):
    with examples.open("a") as file:
        file.write('{"id": 99, "prompt": "p", "domain": "chat", "chosen": ["x"], "rejected": ["y"]}\n')
    assert main(["eval", str(examples)]) == 1
    assert "line 13 (id '99'), field 'chosen': 1 came, expected three responses" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "rows.json").symlink_to(examples)
    assert main(["eval", str(examples), "--output", str(tmp_path / "rows.json")]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    for options in (["--plot", "x.doc"], ["--output", "x.png"]):
        assert main(["eval", str(examples), options[0], str(tmp_path / options[1])]) == 2
        assert "unknown extension" in capsys.readouterr().err
    same = str(tmp_path / "x.json")
    (tmp_path / "x.svg").symlink_to(same)
    assert main(["eval", str(examples), "--output", same, "--plot", str(tmp_path / "x.svg")]) == 2
    assert "--output would be overwritten" in capsys.readouterr().err
