"""A toy preference set that any backbone can learn, a tiny backbone saved to a folder, and one training run."""

import json
from collections.abc import Iterator

import pytest
import torch
from adajudge import AdaJudgeForSequenceClassification
from adajudge.data import ConversationEncoder, PairCollator
from adajudge.training import AdaJudgeTrainer, AdaJudgeTrainingArguments, TrainingRecord, load_pairs
from transformers import Qwen3Config, Qwen3Model
from transformers.utils import logging

from tests.adajudge.chat_templates.families import family_tokenizer

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 96,
}
_QUESTIONS = ("what is two plus two?", "hello", "a question", "how are you?")


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Tiny tensors: several threads would only wait for each other. Works where it is imported."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy_rows(count=32):
    """Pairs whose chosen side speaks of the sky; both sides have several forms."""
    return [
        {
            "prompt": _QUESTIONS[i % 4],
            "chosen": ("The sky is blue.", "blue sky")[i // 4 % 2],
            "rejected": ("another answer", "an answer, two lines", "The grass")[i % 3],
        }
        for i in range(count)
    ]


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def save_backbone(folder, seed=0):
    """A random Qwen3 backbone, the same for a seed, with its tokenizer."""
    logging.disable_progress_bar()
    tokenizer = family_tokenizer("qwen3")
    torch.manual_seed(seed)
    Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **_SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def toy_judge(backbone, **options):
    torch.manual_seed(0)
    sizes = {"num_blocks": 1, "expert_hidden_size": 8, "router_hidden_size": 8} | options
    return AdaJudgeForSequenceClassification.from_backbone(backbone, **sizes)


def toy_trainer(model, folder, rows, **options):
    """A trainer over rows with the Qwen3 tokenizer; the rows are its evaluation set too."""
    tokenizer = family_tokenizer("qwen3")
    encoder = ConversationEncoder(tokenizer, 96)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = load_pairs(write_rows(folder / "pairs.jsonl", rows), encoder).dataset
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return AdaJudgeTrainer(
        model,
        AdaJudgeTrainingArguments(str(folder), **(settings | options)),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=tokenizer,
        data_collator=PairCollator(0),
        callbacks=[TrainingRecord(folder)],
    )


def logged(trainer, key="loss"):
    """The logged values of a key, by step."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
