"""The gate against kernels that have become slow."""

import functools
import json

import pytest
import torch

from benchmarks import check
from benchmarks.test_pooling import pooling_case, ragged

CPU = torch.device("cpu")
SMALL = functools.partial(pooling_case, "pooling, packed", ragged, (200,), 16, 2, torch.float32, CPU)


def measured(*ratios):
    """One measurement after the other; a further one fails."""
    return iter(ratios).__next__


def test_a_ratio_below_the_floor_twice_is_a_failure_that_says_what_and_how_much():
    found = check.failure("pooling, forward", 3.0, measured(1.25, 1.5))
    assert found == "pooling, forward: 1.50x the speed of eager, below the floor of 3.00x"


def test_one_low_measurement_is_noise():
    assert check.failure("pooling, forward", 3.0, measured(0.4, 3.1)) is None


@pytest.mark.parametrize("ratio", [3.0, 8.0])
def test_what_reaches_the_floor_is_measured_once(ratio):
    assert check.failure("pooling, forward", 3.0, measured(ratio)) is None


def test_every_gate_has_a_floor_and_every_floor_a_gate():
    floors = json.loads(check.FLOORS.read_text())
    assert list(floors) == ["cpu"]
    assert list(floors["cpu"]) == [gate.name for gate in check.cpu_gates()]


def test_the_short_check_is_of_the_first_gate_alone(monkeypatch, capsys):
    monkeypatch.setattr(check, "speedup", lambda gate, rounds: 9.0)
    check.main(["--short"])
    assert capsys.readouterr().out == "pooling, packed, forward: 9.00x, floor 3.00x\n"


def test_the_command_fails_and_names_each_case_below_its_floor(monkeypatch):
    monkeypatch.setattr(check, "speedup", lambda gate, rounds: 9.0 if "pooling" in gate.name else 1.1)
    with pytest.raises(SystemExit) as stopped:
        check.main([])
    assert stopped.value.code == "experts, B=16, forward: 1.10x the speed of eager, below the floor of 1.20x"


def test_a_forced_backend_that_cannot_serve_is_an_error_and_not_a_traceback(monkeypatch):
    monkeypatch.setenv("ADAJUDGE_BACKEND", "tpu")
    with pytest.raises(SystemExit, match=r"^ADAJUDGE_BACKEND=tpu: unknown backend 'tpu'"):
        check.main(["--short"])


@pytest.mark.parametrize("backward", [False, True])
def test_a_real_ratio_falls_below_a_floor_that_nothing_reaches(backward):
    gate = check.Gate("pooling, small", SMALL, backward)
    found = check.failure(gate.name, 1e6, functools.partial(check.speedup, gate, 2))
    assert found.startswith("pooling, small: ")
    assert found.endswith("below the floor of 1000000.00x")
