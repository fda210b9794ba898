"""What the tests of a contract's property run over: operations, dtypes, layouts, generated batches."""

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.kernels.batches import LAYOUTS
from tests.kernels.conftest import INTERPRETED
from tests.kernels.operations import ATTENTION, POOLING, ROWWISE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pooling = pytest.mark.parametrize("operation", POOLING, ids=lambda op: op.name)
tokenwise = pytest.mark.parametrize("operation", POOLING + ATTENTION, ids=lambda op: op.name)
rowwise = pytest.mark.parametrize(("name", "draw", "call", "truth"), ROWWISE, ids=[op[0] for op in ROWWISE])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
layouts = pytest.mark.parametrize("kind", LAYOUTS)
generated = settings(
    max_examples=3 if INTERPRETED else 12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
    derandomize=True,  # what a run shows, every run shows
)
# Where tokens lie and what they are stored as meet in no kernel but at its loads: in the interpreter every layout in one dtype,
# and every dtype in the layouts of whole and of split sequences.
stored_layouts = pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for dtype in DTYPES
        for kind in (("padded_left", "shared") if INTERPRETED and dtype != torch.float32 else LAYOUTS)
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
