"""The pictures are made, of what was measured."""

import matplotlib.image
import pytest

from benchmarks import plots
from benchmarks.case import OURS
from benchmarks.entries import Run
from tests.benchmarks import synthetic


@pytest.fixture
def drawn(tmp_path):
    """The files drawn of some benchmarks."""

    def draw(benchmarks, machine=synthetic.CPU):
        return plots.draw(Run.read(synthetic.write(tmp_path / "run.json", benchmarks, machine)), tmp_path)

    return draw


@pytest.mark.parametrize(
    ("device", "machine", "kind"),
    [("cpu", synthetic.CPU, "cpu"), ("cpu", synthetic.GPU, "cpu"), ("cuda", synthetic.GPU, "nvidia-h200")],
)
def test_pictures_are_named_after_what_they_show_and_the_device(drawn, device, machine, kind):
    names = [path.name for path in drawn(synthetic.suite(device), machine)]
    assert names == [f"benchmarks-{kind}-{picture}.png" for picture in ("bandwidth", "speedup", "memory")]


def test_no_picture_is_blank(drawn):
    for path in drawn(synthetic.suite()):
        pixels = matplotlib.image.imread(path)[..., :3]
        assert (pixels < 0.9).any(axis=-1).mean() > 0.01, path.name


def test_what_was_not_measured_is_not_drawn(drawn):
    assert drawn([synthetic.bare(OURS, 1e-5), synthetic.bare("launches prepared", 1e-5)]) == []


def test_a_side_without_memory_has_no_line_in_that_picture(drawn):
    made = synthetic.power_law(OURS, (64, 128), 1e-3, 1.0, peak=None)
    made += synthetic.power_law("eager", (64, 128), 1e-3, 1.0, peak=None)
    assert [path.stem.rpartition("-")[2] for path in drawn(made)] == ["bandwidth", "speedup"]


@pytest.mark.parametrize("peak", [0, 10])
def test_memory_of_nothing_is_drawn_on_a_logarithmic_axis(drawn, peak):
    made = synthetic.power_law(OURS, (64, 128), 1e-3, 1.0, peak=peak)
    assert any("memory" in path.name for path in drawn(made))
