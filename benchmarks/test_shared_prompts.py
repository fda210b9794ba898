"""A whole judge on one prompt and its candidates: the prompt computed once, or once per candidate.

Both sides score the same tokens with the same weights; a case fails if their rewards differ.
"""

import pytest
import torch
from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification
from transformers import Qwen3Config

import adajudge_kernels as ak

PROMPT, RESPONSE, CANDIDATES = 512, 64, 8
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
SIDES = ("adajudge_kernels", "one by one, sdpa")


def judge(attention, device):
    torch.manual_seed(0)
    config = AdaJudgeConfig(backbone_config=Qwen3Config(**SIZES), num_blocks=2)
    config._attn_implementation = attention
    return AdaJudgeForSequenceClassification(config).to(device).eval()


@pytest.fixture(scope="module")
def sides(device):
    """Each side's rewards ``[8]`` as a function of nothing."""
    generator = torch.Generator().manual_seed(0)
    tokens = PROMPT + CANDIDATES * RESPONSE
    ids = torch.randint(SIZES["vocab_size"], (tokens,), generator=generator).to(device)
    shared = ak.SequenceLayout.shared_prompts([PROMPT], [[RESPONSE] * CANDIDATES], device)
    single = ak.SequenceLayout.packed([PROMPT], [RESPONSE], device)
    prompt, responses = ids[:PROMPT], ids[PROMPT:].split(RESPONSE)
    ours, other = judge("adajudge", device), judge("sdpa", device)

    def one_by_one():
        rows = (torch.cat([prompt, response]) for response in responses)
        return torch.cat([other(row, layout=single).logits for row in rows])

    return dict(zip(SIDES, (lambda: ours(ids, layout=shared).logits, one_by_one), strict=True))


def record(benchmark, device):
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        device=str(device),
        dtype="torch.float32",
        shape=f"prompt {PROMPT}, {CANDIDATES} responses of {RESPONSE}, d={SIZES['hidden_size']}, "
        f"{SIZES['num_hidden_layers']} layers",
        backend=ak.backends.choose_backend(device, "refinement").backend,
        useful_tokens_per_second=CANDIDATES * (PROMPT + RESPONSE) / seconds,
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("work", ["forward", "forward + backward"])
def test_shared_prompts(benchmark, sides, work, side, device, synchronise):
    with torch.set_grad_enabled(work != "forward"):
        ours, other = (run() for run in sides.values())
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)

        def run():
            rewards = sides[side]()
            if work != "forward":
                rewards.sum().backward()
            synchronise()

        benchmark.group = f"judge, candidates of one prompt, {work}"
        benchmark.pedantic(run, rounds=7, warmup_rounds=1)
    record(benchmark, device)
