"""Which backend serves a call: forced, automatic, logged, never silently replaced."""

import json
import logging
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import adajudge_kernels as ak
from adajudge_kernels import backends, compiled

LAYOUT = ak.SequenceLayout.packed([1], [2])
CPU = torch.device("cpu")
missing = [name for name in backends.BACKENDS if name not in backends.SERVED]


def test_the_reference_is_always_available():
    assert "reference" in ak.available_backends()


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="unknown backend 'fast'; the backends are reference"),
        ak.use_backend("fast"),
    ):
        pass


@pytest.mark.parametrize("name", missing)
def test_a_forced_backend_that_is_not_here_raises_and_says_why(name, monkeypatch):
    with pytest.raises(ValueError, match=f"no {name} kernels"), ak.use_backend(name):
        pass
    monkeypatch.setenv("ADAJUDGE_BACKEND", name)
    with pytest.raises(ValueError, match=f"ADAJUDGE_BACKEND={name}: .*no {name} kernels"):
        ak.masked_mean_pool(torch.zeros(3, 2), LAYOUT)


def test_use_backend_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("ADAJUDGE_BACKEND", "nonsense")
    with ak.use_backend("reference"):
        assert backends.choose_backend(CPU, "pooling").reason == "forced by use_backend"
    with pytest.raises(ValueError, match="ADAJUDGE_BACKEND=nonsense: unknown backend"):
        backends.choose_backend(CPU, "pooling")


def test_a_name_that_is_no_text_is_refused_as_any_other(monkeypatch):
    monkeypatch.setenv("ADAJUDGE_BACKEND", os.fsdecode(b"\xff"))
    with pytest.raises(ValueError, match=r"ADAJUDGE_BACKEND=.*: unknown backend"):
        backends.choose_backend(CPU, "pooling")


def test_a_forced_backend_holds_in_other_threads():
    seen = []
    with ak.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.choose_backend(CPU, "pooling").reason))
        thread.start()
        thread.join()
    assert seen == ["forced by use_backend"]


def test_the_choice_is_logged_once_per_operation(caplog):
    backends.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "adajudge_kernels"):
        for _ in range(3):
            ak.masked_mean_pool(torch.zeros(3, 2, requires_grad=True), LAYOUT).sum().backward()
    chosen = backends.choose_backend(torch.device("cpu"), "pooling").backend
    assert [record.getMessage() for record in caplog.records] == [
        f"masked_mean_pool: served by the {chosen} backend"
    ]


def run_env(**variables):
    command = [sys.executable, "-m", "adajudge_kernels.env"]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": "", **variables}, check=False)


def test_the_environment_report_names_versions_backends_and_the_choice():
    report = run_env()
    assert report.returncode == 0
    for text in (ak.__version__, torch.__version__, *backends.BACKENDS, "pooling on cpu"):
        assert text in report.stdout


def test_the_environment_report_fails_on_an_unusable_forced_backend():
    report = run_env(ADAJUDGE_BACKEND="nonsense")
    assert report.returncode == 1
    assert "unknown backend 'nonsense'" in report.stdout


def test_triton_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no GPU"), ak.use_backend("triton"):
        pass
    monkeypatch.setattr(backends, "_TRITON_FOUND", False)
    with pytest.raises(ValueError, match="triton is not installed"), ak.use_backend("triton"):
        pass


def test_triton_is_not_silently_replaced(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_FOUND", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_TRITON_INTERPRETED", False)
    with (
        ak.use_backend("triton"),
        pytest.raises(ValueError, match="serves cuda tensors, and these are on cpu"),
    ):
        ak.masked_mean_pool(torch.zeros(3, 2), LAYOUT)
    monkeypatch.setattr(backends, "SERVED", backends.SERVED | {"triton": ("pooling", "experts")})
    expected = "no kernels for loss, only for pooling, experts"
    with ak.use_backend("triton"), pytest.raises(ValueError, match=expected):
        ak.focal_bradley_terry_loss(torch.zeros(2), torch.zeros(2))


def test_a_backend_may_be_forced_for_some_families_only():
    with ak.use_backend("reference", families=("loss",)):
        assert backends.choose_backend(CPU, "loss").reason == "forced by use_backend"
        assert backends.choose_backend(CPU, "pooling").reason != "forced by use_backend"
    expected = "expected some of pooling, refinement, experts, loss"
    with pytest.raises(ValueError, match=expected), ak.use_backend("reference", families=("pools",)):
        pass


@pytest.mark.parametrize(
    ("triton", "cuda", "chosen"),
    [(True, True, "triton"), (True, False, "triton"), (False, True, "cuda"), (False, False, "reference")],
)
def test_cuda_tensors_go_to_triton_if_nothing_was_measured_and_it_is_there(monkeypatch, triton, cuda, chosen):
    monkeypatch.setattr(backends, "_TRITON_FOUND", triton)
    monkeypatch.setattr(backends, "unavailable_reason", lambda *_: None if cuda else "there is none")
    backends.fastest.cache_clear()
    assert backends.choose_backend(torch.device("cuda"), "pooling").backend == chosen
    backends.fastest.cache_clear()


def test_a_traced_function_takes_the_fastest_backend_as_a_constant(monkeypatch, tmp_path):
    """What `choose_backend` asks on a GPU may read a file, which no trace can."""
    file = tmp_path / "backends.json"
    file.write_text("{}")
    monkeypatch.setattr(backends, "measured_names", lambda *_: json.loads(file.read_text()))

    cuda = torch.device("cuda")

    def call(x):
        return x + len(backends.choose_backend(cuda, "pooling").backend)

    backends.fastest.cache_clear()
    x = torch.zeros(2)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(x), call(x))


@pytest.mark.parametrize(
    ("code", "capability", "served"),
    [
        ("sm_80;sm_90", (8, 0), True),
        ("sm_80;sm_90", (8, 6), True),
        ("sm_80;sm_90", (7, 5), False),
        ("sm_80;sm_90", (10, 0), False),
        ("sm_86", (8, 0), False),
        ("sm_80;compute_80", (12, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90a;compute_90a", (10, 0), False),
        ("sm_100f", (10, 3), True),
        ("sm_120;compute_120", (10, 0), False),
    ],
)
def test_compiled_code_serves_what_cuda_says(code, capability, served):
    assert backends.serves_capability(code, capability) == served


@pytest.mark.skipif(compiled.missing is not None, reason="nothing is compiled here")
def test_kernels_for_other_gpus_say_what_to_build(monkeypatch):
    module = SimpleNamespace(with_cuda=True, emulated=False, cuda_code="sm_80;sm_90")
    monkeypatch.setattr(compiled, "module", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    with pytest.raises(ValueError, match=r"of 12.0: install it anew with TORCH_CUDA_ARCH_LIST=12.0"):
        ak.use_backend("cuda").__enter__()


def test_everything_but_triton_works_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None
import torch
import adajudge_kernels as ak
from adajudge_kernels import backends, env, tune
assert "triton" not in ak.available_backends()
assert "triton is not installed" in backends.unavailable_reason("triton")
assert backends.choose_backend(torch.device("cuda"), "pooling").backend == "reference"
layout = ak.SequenceLayout.packed([1], [2])
hidden = torch.randn(3, 8, requires_grad=True)
ak.AdaJudgeHead(8)(hidden, layout).reward.sum().backward()
assert hidden.grad.isfinite().all()
assert env.main() == 0
assert not any(name.startswith("triton.") for name in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_unknown_backend_is_refused_where_it_is_named_and_not_only_in_a_block():
    with pytest.raises(ValueError, match="unknown backend 'foo'"):
        ak.use_backend("foo")
