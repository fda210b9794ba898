"""What a scoring job was asked for, in a form that can be kept and compared."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from adajudge.scoring.scorer import Scorer
from adajudge.weights import digest, digest_of_weights
from adajudge_kernels import __version__
from adajudge_kernels.backends import FAMILIES, choose_backend

# Of a configuration: where it came from, not what it says.
_OF_THE_FILES = ("_name_or_path", "transformers_version")


def describe(scorer: Scorer) -> dict[str, Any]:
    """Everything that a row's scores depend on beside the rows of its window; values of JSON."""
    model, encoder = scorer.model, scorer.encoder
    device = scorer.engine.device
    return {
        "adajudge": __version__,
        "weights": digest_of_weights(model.state_dict()),
        "config": digest(_without_origin(model.config.to_dict())),
        "tokenizer": _digest_of_tokenizer(encoder.tokenizer),
        "max_length": encoder.max_length,
        "truncate_response": encoder.truncate_response,
        "unknown_limit": scorer.unknown_limit,
        "window": scorer.window,
        "token_budget": scorer.engine.asked_budget,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "attention": model.backbone.config.get_text_config(decoder=True)._attn_implementation,
        "compiled": model.backbone._compiled_call_impl is not None,
        "kernels": " ".join(f"{name}:{choose_backend(device, name).backend}" for name in FAMILIES),
    }


def describe_machine(device: torch.device) -> str:
    """What may change the last digits of a score: the device, its threads, the libraries."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The fields that differ, each with both values; empty if none does."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return ", ".join(f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in names)


def _without_origin(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _without_origin(v) for k, v in value.items() if k not in _OF_THE_FILES}
    return [_without_origin(item) for item in value] if isinstance(value, (list, tuple)) else value


def _digest_of_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = tokenizer.get_vocab() if backend is None else backend.to_str()
    return digest([words, tokenizer.chat_template, tokenizer.special_tokens_map])
