"""What the report says of a run's figures."""

import pytest

from benchmarks import report
from benchmarks.case import OURS
from benchmarks.entries import Run
from benchmarks.page import cost_per_million_tokens
from benchmarks.scaling import exponent, fits
from tests.benchmarks import synthetic

TOKENS = (1024, 4096, 16384)


@pytest.fixture
def table_of(tmp_path):
    """The README's table of some benchmarks: rows of cells, the header first."""

    def cells(*benchmarks):
        text = report.table(synthetic.write(tmp_path / "run.json", benchmarks))
        lines = [line for line in text.splitlines() if line and not line.startswith("| ---")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return cells


@pytest.fixture
def run_of(tmp_path):
    """A run of some benchmarks."""
    return lambda *benchmarks: Run.read(synthetic.write(tmp_path / "run.json", benchmarks))


@pytest.fixture
def page_of(tmp_path):
    """The page that the command makes of some files' benchmarks."""

    def text(*files, machine=synthetic.CPU, arguments=(), **more):
        paths = [
            synthetic.write(tmp_path / f"{i}.json", made, machine, **more) for i, made in enumerate(files)
        ]
        report.main([*map(str, paths), "--docs", str(tmp_path), *arguments])
        return (tmp_path / "benchmarks.md").read_text()

    return text


def test_a_row_compares_every_main_side_with_ours(table_of):
    header, row = table_of(
        synthetic.benchmark(OURS, 2e-3, moved=12_000_000, bandwidth=12e9, peak_bytes=1_000_000),
        synthetic.benchmark("eager", 12e-3, peak_bytes=96_000_000),
        synthetic.benchmark("torch.compile", 5e-3),
        synthetic.benchmark("triton", 1e-3),
    )
    assert header == ["case", "work", OURS, "eager", "torch.compile", "of bandwidth", "MB, ours / eager"]
    name = "pooling, packed, T=4096 B=12 d=1024 K=3, bf16"
    assert row == [name, "forward", "2.00 ms", "6.00x", "2.50x", "50 %", "1.00 / 96.0"]


def test_a_ratio_is_of_our_time_between_the_other_sides_rounds(table_of):
    row = table_of(
        synthetic.benchmark(OURS, 2e-3), synthetic.benchmark("eager", 12e-3, times_adajudge_kernels=4.0)
    )[1]
    assert row[3] == "4.00x"


def test_cuda_events_go_before_the_rounds_median(table_of):
    row = table_of(
        synthetic.benchmark(OURS, 2.0, cuda_event_seconds=1e-3),
        synthetic.benchmark("eager", 2.0, cuda_event_seconds=8e-3),
    )[1]
    assert row[2:4] == ["1.00 ms", "8.00x"]


@pytest.mark.parametrize(
    ("without", "column"), [("share_of_bandwidth", "of bandwidth"), ("peak_bytes", "MB, ours / eager")]
)
def test_what_a_benchmark_does_not_say_is_left_empty(table_of, without, column):
    said, other = "T=64 B=2 d=8 K=1", "T=128 B=2 d=8 K=1"
    header, *rows = table_of(
        *(synthetic.benchmark(side, 1e-3, shape=said) for side in (OURS, "eager")),
        *(
            synthetic.benchmark(side, 1e-3, "gate", shape=other, **{without: None})
            for side in (OURS, "eager")
        ),
    )
    assert [bool(row[header.index(column)]) for row in rows] == [True, False]


def test_a_column_without_a_figure_is_left_out(table_of):
    header, _ = table_of(
        synthetic.benchmark(OURS, 2e-3, peak_bytes=None, share_of_bandwidth=None),
        synthetic.benchmark("eager", 12e-3, peak_bytes=None),
    )
    assert header == ["case", "work", OURS, "eager"]


@pytest.mark.parametrize(
    ("case", "shape", "name"),
    [
        ("experts, B=16", "B=16 d=64", "experts, B=16 d=64, bf16"),
        ("experts, B=16", "d=64", "experts, B=16, d=64, bf16"),
        ("experts, B=16", "B=160 d=64", "experts, B=16, B=160 d=64, bf16"),
    ],
)
def test_a_size_is_said_once(table_of, case, shape, name):
    made = [synthetic.benchmark(side, 1e-3, case, shape=shape) for side in (OURS, "eager")]
    assert table_of(*made)[1][0] == name


def test_forward_and_backward_of_a_case_are_neighbours(table_of):
    rows = table_of(
        *(
            synthetic.benchmark(side, 1e-3, case, work=work)
            for side in (OURS, "eager")
            for work in ("forward", "forward + backward")
            for case in ("pooling", "gate", "loss")
        )
    )[1:]
    assert [row[1] for row in rows] == ["forward", "forward + backward"] * 3
    assert [row[0].partition(",")[0] for row in rows] == ["pooling"] * 2 + ["gate"] * 2 + ["loss"] * 2


def test_of_each_case_the_largest_size_is_shown_that_has_the_most_sides(table_of, page_of):
    made = [
        synthetic.benchmark(side, 1e-3, shape=f"T={tokens}", moved=1000 * tokens, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for tokens in TOKENS
        for side in (OURS, "eager", *(["eager packed"] if tokens < 16384 else []))
    ]
    assert [row[0] for row in table_of(*made)[1:]] == [
        f"pooling, packed, T=4096, {dtype}" for dtype in ("bf16", "fp32")
    ]
    for tokens in TOKENS:
        assert f"pooling, packed, T={tokens}, fp32" in page_of(made)


def test_whole_judges_have_tokens_per_second_by_side(table_of):
    shape = "T=900 B=3 d=64"
    made = {"case": "scoring", "shape": shape}
    rows = table_of(
        synthetic.benchmark("prompts not shared", 1.0, useful_tokens_per_second=12345.6, **made),
        synthetic.benchmark("padded, arrival order", 1.0, useful_tokens_per_second=6000.0, **made),
    )
    name = f"scoring, {shape}, bf16, forward"
    assert rows[1:] == [[name, "prompts not shared", "12 346"], [name, "padded, arrival order", "6 000"]]


def test_the_cost_of_a_call_is_the_pages_alone(table_of, page_of):
    pooling = [synthetic.benchmark(OURS, 2e-3), synthetic.benchmark("eager", 4e-3)]
    calls = [synthetic.bare(OURS, 18e-6), synthetic.bare("torch.library operator", 36e-6)]
    assert [row[0].partition(",")[0] for row in table_of(*pooling, *calls)] == ["case", "pooling"]
    row = "| eager cost of depth_gate, inference | torch.library operator | 36.0 us | 2.00x |"
    assert row in page_of([*pooling, *calls])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_exact(power):
    assert exponent(TOKENS, [3e-7 * t**power for t in TOKENS]) == pytest.approx(power, abs=1e-12)


@pytest.mark.parametrize("side", [OURS, "eager"])
def test_time_and_memory_over_tokens_are_fitted_for_every_side(run_of, side):
    both = {OURS: (1.0, 0.5), "eager": (1.5, 2.0)}
    run = run_of(
        *synthetic.power_law(OURS, TOKENS, 1e-3, 1.0, 8e6, 0.5),
        *synthetic.power_law("eager", TOKENS, 1e-3, 1.5, 8e6, 2.0),
    )
    fit = next(fit for fit in fits(run.entries) if fit.side == side)
    assert (fit.letter, fit.sizes) == ("T", list(TOKENS))
    assert (fit.time, fit.memory) == pytest.approx(both[side])


def test_rows_of_experts_are_fitted_though_their_cases_have_names_of_their_own(run_of):
    made = [
        synthetic.benchmark(OURS, 1e-4 * b**0.75, f"experts, B={b}", shape=f"B={b} d=64 h=8")
        for b in (1, 16, 256)
    ]
    (fit,) = fits(run_of(*made).entries)
    assert (fit.family, fit.fixed, fit.letter) == ("experts", "d=64 h=8 bf16", "B")
    assert fit.time == pytest.approx(0.75)


def test_two_sizes_are_not_fitted(run_of):
    assert fits(run_of(*synthetic.power_law(OURS, TOKENS[:2], 1e-3, 1.0)).entries) == []


def test_widths_and_depths_are_not_mixed(run_of):
    shapes = ("T=1024 B=4 d=64 K=3", "T=4096 B=9 d=64 K=3", "T=16384 B=9 d=64 K=1", "T=4 B=1 d=32 K=3")
    assert fits(run_of(*(synthetic.benchmark(OURS, 1e-3, shape=shape) for shape in shapes)).entries) == []


@pytest.mark.parametrize("peak", [None, 0, 100_000])
def test_no_law_is_read_from_peaks_that_are_missing_or_small(run_of, peak):
    (fit,) = fits(run_of(*synthetic.power_law(OURS, TOKENS, 1e-3, 1.0, peak, 0.5)).entries)
    assert fit.memory is None
    assert fit.small == (peak is not None)


def test_a_million_tokens_cost_the_price_of_their_time():
    assert cost_per_million_tokens(tokens_per_second=1e6 / 3600, price_per_hour=2.5) == pytest.approx(2.5)


def test_the_page_has_each_sides_cost_at_the_given_price(page_of):
    made = [synthetic.benchmark("prompts not shared", 1.0, "scoring", useful_tokens_per_second=10_000.0)]
    assert "| prompts not shared | 10 000 | 0.0833 |" in page_of(made, arguments=["--price-per-hour", "3"])


def test_the_page_has_a_section_for_each_file(page_of):
    text = page_of([synthetic.benchmark(OURS, 2e-3)], [synthetic.benchmark(OURS, 3e-3)])
    assert text.count("## Made Up 1000\n") == 2
    assert "2.00 ms" in text
    assert "3.00 ms" in text


def test_the_page_links_pictures_that_are_there(page_of, tmp_path):
    links = [
        line.partition("](")[2].rstrip(")")
        for line in page_of(synthetic.suite()).splitlines()
        if line.startswith("![")
    ]
    assert len(links) == 3
    assert all((tmp_path / link).is_file() for link in links)


def test_the_command_prints_the_readmes_table_of_each_file(page_of, tmp_path, capsys):
    page_of(*[[synthetic.benchmark(OURS, x), synthetic.benchmark("eager", 6e-3)] for x in (2e-3, 3e-3)])
    printed = capsys.readouterr().out
    assert all(report.table(tmp_path / name) in printed for name in ("0.json", "1.json"))


def test_the_readmes_tables_are_replaced_by_those_of_every_file(page_of, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\n\nolder tables\n\n{report.END}\nafter\n")
    made = [[synthetic.benchmark(OURS, x), synthetic.benchmark("eager", 6e-3)] for x in (2e-3, 3e-3)]
    for _ in range(2):  # once more changes nothing
        page_of(*made, arguments=["--readme", str(readme)])
        tables = report.tables([tmp_path / "0.json", tmp_path / "1.json"])
        assert readme.read_text() == f"before\n{report.BEGIN}\n\n{tables}\n\n{report.END}\nafter\n"
    assert tables.count("2.00 ms") == tables.count("3.00 ms") == 1


@pytest.mark.parametrize("text", ["", f"{report.BEGIN}\n", f"{report.END}\n{report.BEGIN}\n"])
def test_a_readme_without_a_place_for_tables_is_refused_and_kept(page_of, tmp_path, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(SystemExit):
        page_of([synthetic.benchmark(OURS, 2e-3)], arguments=["--readme", str(readme)])
    assert f"--readme: {readme}: expected a line '<!-- measured" in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"benchmarks": [{}]}'])
def test_what_is_no_results_file_is_named(tmp_path, text, capsys):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path), "--docs", str(tmp_path)])
    assert f"{path}: expected a file that --benchmark-json has written" in capsys.readouterr().err


@pytest.mark.parametrize("price", ["0", "-3", "inf", "nan", "much"])
def test_a_price_that_is_none_is_refused(tmp_path, price, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main(["--price-per-hour", price, "--docs", str(tmp_path)])
    assert "--price-per-hour" in capsys.readouterr().err


def test_nothing_is_printed_of_what_was_not_measured(page_of, capsys):
    page_of([synthetic.bare(OURS, 1e-5)])
    assert capsys.readouterr().out.split() == ["Made", "Up", "1000,", "2026-11-21:"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"id": "2102fe32" * 5, "dirty": False}, "; 2026-11-21, commit 2102fe322102."),
        ({"id": "2102fe32" * 5, "dirty": True}, "; 2026-11-21, commit 2102fe322102, changed."),
        ({"id": "unversioned", "dirty": False}, "; 2026-11-21."),
    ],
)
def test_the_page_says_what_was_measured(page_of, found, said):
    assert said in page_of([synthetic.benchmark(OURS, 1e-3)], commit_info=found)
