"""What the suite has measured on its way, printed at its end: compilations that passed, worst errors by operation."""

import pytest

COMPILED = {}  # language and architecture -> {configuration: registers}
ERRORS = {}  # "operation, dtype" -> (share of the contract's bound, error)


def note_compilation(arch, configuration, registers):
    """A kernel that compiled for an architecture and kept to its limits."""
    COMPILED.setdefault(arch, {})[configuration] = registers


def note_error(operation, dtype, error, bound):
    """An error against fp64 beside the largest that the contract grants."""
    key = f"{operation}, {str(dtype).removeprefix('torch.')}"
    ERRORS[key] = max(ERRORS.get(key, (0.0, 0.0)), (error / bound, error))


def pytest_sessionfinish(session):
    """Of a worker of pytest-xdist: hand over what it has noted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["noted"] = [COMPILED, ERRORS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """In the process that waits for the workers: take it."""
    compiled, errors = getattr(node, "workeroutput", {}).get("noted", ({}, {}))
    for arch, configurations in compiled.items():
        COMPILED.setdefault(arch, {}).update(configurations)
    for key, worst in errors.items():
        ERRORS[key] = max(ERRORS.get(key, (0.0, 0.0)), tuple(worst))


def pytest_terminal_summary(terminalreporter):
    """Print it."""
    if COMPILED:
        terminalreporter.section("kernels compiled, none with spills")
        for arch, configurations in sorted(COMPILED.items()):
            most = max(configurations.values())
            registers = f", {most} registers a thread at most" if most else ""
            terminalreporter.write_line(f"{arch}: {len(configurations)} kernels{registers}")
    if ERRORS:
        terminalreporter.section("worst error against fp64, and its share of what the contract grants")
        for key, (share, error) in sorted(ERRORS.items()):
            terminalreporter.write_line(f"{key:<42} {error:.1e}  {100 * share:3.0f} %")
