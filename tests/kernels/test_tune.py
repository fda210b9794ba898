"""Measured configurations: found, kept, read back, and refused where they are broken."""

import json

import pytest
import torch

from adajudge_kernels import backends, measurements, tune
from adajudge_kernels.pooling import configurations
from adajudge_kernels.pooling.configurations import Tile, candidates, default_tile

ROW = (4096, 3, torch.bfloat16)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The measured file of a GPU that is not here."""
    path = tmp_path / "tiles-some-gpu.json"
    for module in (configurations, tune):
        monkeypatch.setattr(module, "measured_file", lambda kind: path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    configurations.forget()
    yield path
    configurations.forget()


def test_what_is_faster_is_kept_written_and_used(file):
    favourite = candidates("scan", *ROW)[5]
    seen = []

    def measure(call):
        used = configurations.tile("scan", *ROW)
        seen.append(used)
        return 1.0 if used == favourite else 2.0

    found = tune.tune(*ROW, {"scan": lambda: None}, measure)
    assert seen == candidates("scan", *ROW)
    assert found == {"scan d=4096 K=3 bfloat16": favourite}
    tune.write(found)
    assert configurations.tile("scan", *ROW) == favourite
    assert configurations.tile("scan", 4096, 2, torch.bfloat16) == default_tile(
        "scan", 4096, 2, torch.bfloat16
    )
    tune.write({"sums d=4096 K=1 bfloat16": default_tile("sums", 4096, 1, torch.bfloat16)})
    assert configurations.tile("scan", *ROW) == favourite
    again = tune.tune(*ROW, {"scan": lambda: None}, lambda call: 1.0)  # it is not faster any more
    tune.write(again)
    assert configurations.tile("scan", *ROW) == default_tile("scan", *ROW)
    assert set(json.loads(file.read_text())) == {"sums d=4096 K=1 bfloat16"}


def test_a_gain_within_noise_keeps_the_default(file):
    times = iter([1.0] + [0.99] * 100)
    assert tune.tune(*ROW, {"scan": lambda: None}, lambda call: next(times)) == {
        "scan d=4096 K=3 bfloat16": None
    }


def test_candidates_that_do_not_run_are_passed_over(file):
    def measure(call):
        if configurations.tile("scan", *ROW) != default_tile("scan", *ROW):
            raise pytest.importorskip("triton").runtime.errors.OutOfResources(300, 255, "registers")
        return 1.0

    assert tune.tune(*ROW, {"scan": lambda: None}, measure) == {"scan d=4096 K=3 bfloat16": None}


@pytest.mark.parametrize(
    "entry",
    [
        {"tokens": 3, "block": 4096, "warps": 8, "stages": 1, "registers": None},
        {"tokens": 128, "block": 4096, "warps": 8, "stages": 1, "registers": None},
        {"tokens": 2, "block": 2048, "warps": 8, "stages": 1, "registers": None},
        {"tokens": 2, "block": 4096, "warps": 8, "stages": 1, "registers": 300},
        {"tokens": 2, "block": 4096, "warps": 8},
        [2, 4096, 8, 1],
    ],
)
def test_a_broken_file_is_told_and_not_used(file, entry, caplog):
    file.write_text(json.dumps({"scan d=4096 K=3 bfloat16": entry}))
    assert configurations.tile("scan", *ROW) == default_tile("scan", *ROW)
    assert "is not used" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"nonsense": {"tokens": 2, "block": 2, "warps": 4, "stages": 1, "registers": None}}',
        '{"old d=64 K=1 float32": {"tokens": 2, "block": 64, "warps": 4, "stages": 1, "registers": None}}',
        "[]",
    ],
)
def test_a_file_of_something_else_is_told_and_not_used(file, text, caplog):
    file.write_text(text)
    assert configurations.tile("scan", *ROW) == default_tile("scan", *ROW)
    assert "is not used" in caplog.text


@pytest.mark.parametrize(
    "kernel", ["scan", "scan_backward", "sums", "dots", "spread_means", "spread_attention"]
)
def test_every_kernel_has_a_call_that_launches_it_as_forced(kernel, file, monkeypatch):
    pytest.importorskip("triton")
    from tests.kernels.triton_compile import recorded_launches

    monkeypatch.setattr(backends, "_TRITON_INTERPRETED", True)  # nothing is run: let CPU tensors through
    d = 8192 if kernel == "dots" else 16
    with backends.use_backend("triton", families=("pooling",)), recorded_launches() as found:
        calls = tune.operations(d, 2, torch.float32, 1024, torch.device("cpu"))
        forced = default_tile(kernel, d, 2, torch.float32)._replace(tokens=64)
        found.clear()
        with configurations.forced_tile(kernel, forced):
            calls[kernel]()
    assert 64 in [dict(launch.constants).get("TOKENS") for launch in found if launch.name != "zero_padding"]


def test_wide_rows_are_tuned_with_their_own_kernel():
    assert "dots" in tune.operations(8192, 1, torch.float32, 1, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_tiles_are_powers_of_two_within_a_chunk():
    for kernel in ("scan", "scan_backward", "sums", "dots", "spread_means", "spread_attention"):
        for d in (1, 40, 768, 4096, 16384):
            for depths in (1, 3, 8):
                for tile in candidates(kernel, d, depths, torch.float32):
                    assert isinstance(tile, Tile)
                    assert all(x & (x - 1) == 0 for x in tile[:3])
                    assert tile.tokens <= configurations.CHUNK_TOKENS


@pytest.fixture
def backends_file(tmp_path, monkeypatch):
    """The file of the fastest backends on a GPU that is not here, and that everything runs on."""
    path = tmp_path / "backends-some-gpu.json"
    for module in (measurements, tune):
        monkeypatch.setattr(module, "measured_file", lambda kind: path)
    for module in (backends, tune):
        monkeypatch.setattr(module, "unavailable_reason", lambda backend, family=None: None)
    backends.fastest.cache_clear()
    yield path
    backends.fastest.cache_clear()


def chosen_on_gpu(family):
    return backends.choose_backend(torch.device("cuda"), family)


@pytest.mark.parametrize(("cuda", "chosen"), [(0.9, "cuda"), (0.99, "triton"), (1.5, "triton")])
def test_the_faster_backend_serves_later_calls(backends_file, monkeypatch, cuda, chosen):
    monkeypatch.setattr(backends, "_TRITON_FOUND", True)
    assert chosen_on_gpu("pooling") == ("triton", "the usual one on GPUs")
    times = {"triton": 1.0, "cuda": cuda}

    def measure(call):
        return times[backends.choose_backend(torch.device("cuda"), call()).backend]

    shapes = [{family: lambda family=family: family for family in ("pooling", "loss")}] * 2
    found = tune.tune_backends(shapes, measure)
    assert found == {"pooling": chosen, "loss": chosen}
    tune.write_backends(found)
    assert json.loads(backends_file.read_text()) == found
    assert chosen_on_gpu("pooling") == (chosen, "measured to be the fastest on this GPU")
    assert chosen_on_gpu("refinement") == ("triton", "the usual one on GPUs")


def test_a_measured_backend_that_cannot_be_used_is_passed_over(backends_file, monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_FOUND", True)
    backends_file.write_text('{"pooling": "cuda"}')
    monkeypatch.setattr(backends, "unavailable_reason", lambda backend, family=None: "no GPU")
    assert chosen_on_gpu("pooling").backend == "triton"


@pytest.mark.parametrize("text", ["{", "[]", '{"pooling": "fast"}'])
def test_a_broken_file_of_backends_is_told_and_not_used(backends_file, text, monkeypatch, caplog):
    monkeypatch.setattr(backends, "_TRITON_FOUND", True)
    backends_file.write_text(text)
    assert chosen_on_gpu("pooling").backend == "triton"
    assert "is not used" in caplog.text


def test_what_is_timed_for_a_backend_gives_gradients_of_everything():
    calls = tune.backend_calls(64, 2, torch.float32, 2048, torch.device("cpu"))
    assert set(calls) == set(backends.SERVED["cuda"]) & set(backends.SERVED["triton"])
    for call in calls.values():
        assert all(grad.isfinite().all() for grad in call())


def test_without_cuda_kernels_nothing_is_chosen(monkeypatch, capsys):
    monkeypatch.setattr(tune, "unavailable_reason", lambda backend: "there is none")
    assert tune.tune_backends([], lambda call: 1.0) == {}
    assert "cuda cannot be used: there is none" in capsys.readouterr().out
