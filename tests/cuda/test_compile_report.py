"""The command that prints what nvcc made of the CUDA kernels."""

from types import SimpleNamespace

import pytest

from tests.cuda import compile_report


def test_without_a_build_by_nvcc_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_report, "BUILD", tmp_path)
    monkeypatch.setattr(compile_report.compiled, "module", SimpleNamespace(with_cuda=True))
    compile_report.kernels.cache_clear()
    with pytest.raises(
        SystemExit, match=r"\.cu\.o\.log: no such report; it is written by `make setup` where nvcc"
    ):
        compile_report.main()
    compile_report.kernels.cache_clear()


@pytest.mark.parametrize("module", [None, SimpleNamespace(with_cuda=False)])
def test_without_cuda_kernels_it_says_so(module, monkeypatch):
    monkeypatch.setattr(compile_report.compiled, "module", module)
    with pytest.raises(SystemExit, match="holds no CUDA kernels"):
        compile_report.main()


def test_without_triton_it_says_what_reads_the_machine_code(monkeypatch):
    def no_triton():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(compile_report.compiled, "module", SimpleNamespace(with_cuda=True))
    monkeypatch.setattr(compile_report, "scans_table", no_triton)
    with pytest.raises(SystemExit, match="triton: not installed"):
        compile_report.main()
