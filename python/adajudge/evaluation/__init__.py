"""How good a judge is on the public benchmarks of reward models, from their files on this machine.

evaluation = evaluate(Scorer.from_pretrained("my_judge"), ["total_dataset.json"])
evaluation.totals["overall"]["hard"]  # Figure(value, low, high), in per cent
"""

from .benchmarks import BENCHMARKS, Benchmark
from .evaluation import Evaluation, evaluate
from .intervals import Figure

__all__ = ["BENCHMARKS", "Benchmark", "Evaluation", "Figure", "evaluate"]
