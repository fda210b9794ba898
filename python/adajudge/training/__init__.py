"""Training a judge on preference pairs: the data, the trainer, LoRA adapters, and the record of a run.

pairs = load_pairs("pairs.jsonl", encoder)
trainer = AdaJudgeTrainer(model, AdaJudgeTrainingArguments("out"), train_dataset=pairs.dataset)
trainer.train()
"""

from adajudge.loading import load_judge

from .lora import add_lora
from .pairs import LoadedPairs, PairDataset, load_pairs
from .record import TrainingRecord, TrainingTable, draw_training_curve
from .trainer import AdaJudgeTrainer, AdaJudgeTrainingArguments

__all__ = [
    "AdaJudgeTrainer",
    "AdaJudgeTrainingArguments",
    "LoadedPairs",
    "PairDataset",
    "TrainingRecord",
    "TrainingTable",
    "add_lora",
    "draw_training_curve",
    "load_judge",
    "load_pairs",
]
