"""multi_view_pool against the same pooling as people write it in eager PyTorch, on padded states.

Both sides do the same work on the same numbers; a case fails if their results differ.
"""

import pytest
import torch

import adajudge_kernels as ak

BATCH, LENGTH, WIDTH, DEPTHS = 8, 512, 1024, 3


def eager(states, alpha, weight, bias, attention_mask, response_mask):
    """The three views by stacking the states and masking: [K, B, L, d]."""
    refined = (torch.stack(states) * alpha.T[:, :, None, None]).sum(dim=0)
    logits = (refined @ weight + bias).masked_fill(~attention_mask, float("-inf"))
    beta = torch.softmax(logits, dim=1)
    response = response_mask.unsqueeze(-1).to(refined)
    mean = (refined * response).sum(dim=1) / response.sum(dim=1)
    position = torch.arange(refined.shape[1], device=refined.device)
    last = (position * response_mask).argmax(dim=1)
    rows = torch.arange(len(refined), device=refined.device)
    return refined[rows, last], mean, (beta.unsqueeze(-1) * refined).sum(dim=1)


@pytest.fixture(scope="module")
def case(device):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTH // 4, LENGTH + 1, (BATCH,), generator=generator)
    lengths[0] = LENGTH
    position = torch.arange(LENGTH)
    attention_mask = position < lengths[:, None]
    response_mask = attention_mask & (position >= lengths[:, None] // 3)
    states = [
        torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(device).requires_grad_()
        for _ in range(DEPTHS)
    ]
    alpha = torch.softmax(torch.randn(BATCH, DEPTHS, generator=generator), dim=1).to(device)
    weight = (torch.randn(WIDTH, generator=generator) / WIDTH**0.5).to(device)
    masks = attention_mask.to(device), response_mask.to(device)
    return states, alpha, weight, torch.zeros(1, device=device), masks, int(lengths.sum())


def ours(states, alpha, weight, bias, layout):
    return ak.multi_view_pool([x.flatten(0, 1) for x in states], alpha, weight, bias, layout)


def sides(case):
    states, alpha, weight, bias, masks, _ = case
    layout = ak.SequenceLayout.padded(*masks)
    return {
        "adajudge_kernels": lambda: ours(states, alpha, weight, bias, layout),
        "eager": lambda: eager(states, alpha, weight, bias, *masks),
    }


def gradients(states, views):
    return torch.autograd.grad(sum(view.square().sum() for view in views), states)


def record(benchmark, case, bytes_moved, read_bandwidth, device):
    states, tokens = case[0], case[-1]
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        device=str(device),
        dtype=str(states[0].dtype),
        shape=f"B={BATCH} L={LENGTH} d={WIDTH} K={DEPTHS}",
        backend=ak.backends.choose_backend(device, "pooling").backend,
        useful_tokens_per_second=tokens / seconds,
        bytes_that_must_move=bytes_moved,
        share_of_read_bandwidth=bytes_moved / seconds / read_bandwidth,
    )


@pytest.mark.parametrize("side", ["adajudge_kernels", "eager"])
def test_pooling_forward(benchmark, case, side, device, synchronise, read_bandwidth):
    both = sides(case)
    with torch.no_grad():
        for a, b in zip(both["adajudge_kernels"](), both["eager"](), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

        def run():
            both[side]()
            synchronise()

        benchmark.group = "pooling forward"
        benchmark.pedantic(run, rounds=7, warmup_rounds=2)
    record(benchmark, case, DEPTHS * case[-1] * WIDTH * 4, read_bandwidth, device)


@pytest.mark.parametrize("side", ["adajudge_kernels", "eager"])
def test_pooling_forward_and_backward(benchmark, case, side, device, synchronise, read_bandwidth):
    both, states = sides(case), case[0]
    for a, b in zip(*(gradients(states, run()) for run in both.values()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def run():
        gradients(states, both[side]())
        synchronise()

    benchmark.group = "pooling forward + backward"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    record(benchmark, case, 3 * DEPTHS * case[-1] * WIDTH * 4, read_bandwidth, device)
