"""The command that prints what nvcc made of the CUDA kernels."""

import pytest

from tests.cuda import compile_report


def test_without_a_build_by_nvcc_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(compile_report, "BUILD", tmp_path)
    compile_report.kernels.cache_clear()
    with pytest.raises(
        SystemExit, match=r"\.cu\.o\.log: no such report; it is written by `make setup` where nvcc"
    ):
        compile_report.main()
    compile_report.kernels.cache_clear()
