"""Tiny judges of five backbone families, and one batch of token ids in every form."""

import torch
from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen3Config

from adajudge_kernels import SequenceLayout
from tests.kernels.batches import Batch

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

# Windows shorter than the longest sequence of BATCH, so that they matter.
BACKBONES = {
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "llama": lambda: LlamaConfig(**SMALL),
    "phi3": lambda: Phi3Config(**SMALL),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=6, layer_types=_WINDOWS),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=7),
}
BATCH = Batch((5, 0, 9), ((4, 1), (6,), (8, 3)))
LONGEST = 17
# The attention "adajudge" refuses windows that matter.
SERVED = [(family, attention) for family in BACKBONES for attention in ("sdpa", "eager")]
SERVED += [(family, "adajudge") for family in BACKBONES if family not in ("gemma3", "mistral")]


def wide_backbone(family):
    """The family's configuration, with windows of which BATCH notices nothing."""
    config = BACKBONES[family]()
    if getattr(config, "sliding_window", None):
        config.sliding_window = LONGEST
    return config


def random_judge(family="qwen3", attn_implementation="sdpa", backbone=None, **options):
    """A judge whose zero-initialised head weights are random too, so that every path matters."""
    torch.manual_seed(0)
    sizes = {"num_blocks": 2, "expert_hidden_size": 8, "router_hidden_size": 8} | options
    config = AdaJudgeConfig(backbone_config=backbone or BACKBONES[family](), **sizes)
    config._attn_implementation = attn_implementation
    model = AdaJudgeForSequenceClassification(config).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def token_ids(batch=BATCH):
    """One random id per token of the batch (in the order of its shared layout)."""
    return torch.randint(1, 64, (batch.num_tokens,), generator=torch.Generator().manual_seed(1))


def padded_inputs(ids, kind, batch=BATCH):
    """input_ids, attention_mask and response_mask of a padded batch; padding holds token 0."""
    layout, source = batch.lay_out(kind)
    shape = layout.padded_shape
    return {
        "input_ids": torch.where(source >= 0, ids[source.clamp(min=0)], 0).view(shape),
        "attention_mask": (source >= 0).long().view(shape),
        "response_mask": (layout.roles == 2).long().view(shape),
    }


def flat_inputs(ids, kind, batch=BATCH):
    """input_ids and layout of a packed or prompt-shared batch."""
    layout, source = batch.lay_out(kind)
    return {"input_ids": ids[source][None], "layout": layout}


def inputs(ids, kind, batch=BATCH):
    return padded_inputs(ids, kind, batch) if kind.startswith("padded") else flat_inputs(ids, kind, batch)


def one_by_one(model, ids, batch=BATCH):
    """Rewards ``[B]``, every sequence in a call of its own."""
    rewards = []
    for sequence in batch.sequences:
        prompt = sequence.response.count(False)
        layout = SequenceLayout.packed([prompt], [len(sequence.rows) - prompt])
        rewards.append(model(input_ids=ids[sequence.rows][None], layout=layout).logits[:, 0])
    return torch.cat(rewards)
