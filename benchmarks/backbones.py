"""Backbones of known models' sizes with random weights: how fast they run does not depend on what they have learnt."""

from __future__ import annotations

import torch
from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification
from transformers import Phi3Config, PretrainedConfig, Qwen3Config


def qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    )


CONFIGURATIONS: dict[str, PretrainedConfig] = {
    "tiny": Qwen3Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
    ),
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32),
    "Phi-3.5-mini": Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        pad_token_id=0,
    ),
}


def judge(
    name: str, attention: str, depths: int, dtype: torch.dtype, device: torch.device
) -> AdaJudgeForSequenceClassification:
    """A judge of K = `depths` on a backbone of this size; the same weights whatever the attention."""
    config = AdaJudgeConfig(backbone_config=CONFIGURATIONS[name].to_dict(), num_blocks=depths)
    config._attn_implementation = attention
    torch.manual_seed(0)
    with torch.device(device):
        model = AdaJudgeForSequenceClassification(config).to(dtype)
    draw_head(model.head)
    return model.eval()


@torch.no_grad()
def draw_head(head: torch.nn.Module) -> None:
    """Weights that make every part count: a new head's blocks add nothing and its router is uniform."""
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
