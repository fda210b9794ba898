"""What a training run leaves for people: ``training_log.jsonl`` while it runs, ``training_curve.png`` at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

LOG_NAME = "training_log.jsonl"
CURVE_NAME = "training_curve.png"


class TrainingRecord(TrainerCallback):
    """Appends every log to ``OUTPUT/training_log.jsonl``, one JSON object a line, each with its step.

    A resumed run begins with the logs of its checkpoint, so that no step is there twice or missing.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / LOG_NAME

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the file anew, with what the checkpoint has logged."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            self.path.write_text(lines, encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Append the latest log."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def draw_training_curve(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw loss and pairwise accuracy over steps, training and evaluation, into a PNG file.

    Args:
        history: the trainer's ``state.log_history``.
        path: of the file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("loss", "loss"), ("accuracy", "pairwise accuracy")), strict=True
    ):
        for key, label, marker in ((name, "training", ""), (f"eval_{name}", "evaluation", "o")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, label=label)
        axes.set(title=title, xlabel="step")
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=150)
