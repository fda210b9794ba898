"""multi_view_pool against the same pooling in plain PyTorch on padded states, eager and compiled, and on packed states.

``cpu_pooling``: equal lengths and no padding, which is eager's best case. The others have the ragged lengths of
`lengths.py`. On a GPU our own two backends are sides of their own.
"""

import functools

import pytest
import torch

import adajudge_kernels as ak
from benchmarks import lengths
from benchmarks.batches import Batch
from benchmarks.case import OURS, Case, Side, compiled, copies, exact_by_parts
from benchmarks.eager import eager_packed_pooling, eager_pooling, eager_pooling_as_products

GPU_BACKENDS = ("triton", "cuda")
# The parameter next to a test changes least often: a case is drawn once for all its sides.
backwards = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_and_backward"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def equal_lengths(batch, length, device):
    return Batch.packed([length // 3] * batch, [length - length // 3] * batch, device)


def ragged(tokens, device):
    return Batch.packed(*lengths.sequences(tokens), device)


def six_candidates(prompts, device):
    """Long prompts, as conversations have: those of `lengths` are of 10 to 100 tokens, and little is shared."""
    return Batch.shared([512] * prompts, lengths.candidates(prompts)[1], device)


def pooling_case(group, draw_batch, size, width, depths, dtype, device, places):
    """`draw_batch(size, device)`: a `Batch`. Ours reads its flat rows as they lie, and the padded ones as a side."""
    batch = draw_batch(*size, device)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    count = len(batch.index)
    flat = [drawn(batch.rows, width).to(dtype) for _ in range(depths)]
    alpha = torch.softmax(drawn(count, depths), dim=1).to(dtype)
    weight, bias = (drawn(width) / width**0.5).to(dtype), torch.zeros(1, dtype=dtype, device=device)
    others = alpha, weight, bias
    masks = batch.masks
    padded = copies([batch.pad(x) for x in flat], places)
    flat_places = copies(flat, places)
    padded_layout, sequence, last = batch.padded_layout, batch.sequence_of, batch.last_rows
    response = batch.layout.roles == ak.TokenRole.RESPONSE

    def ours(*states):
        return ak.multi_view_pool(states, *others, batch.layout)

    def ours_padded(*states):
        return ak.multi_view_pool([x.flatten(0, 1) for x in states], *others, padded_layout)

    def forced(backend, *states):
        with ak.use_backend(backend, families=("pooling",)):
            return ours(*states)

    def exact(backward):
        wide = [x.double() for x in (weight, bias)]

        def some_sequences(some, *states):
            some_masks = (mask[some] for mask in masks)
            return eager_pooling(
                [batch.pad(x, some) for x in states], alpha[some].double(), *wide, *some_masks
            )

        return exact_by_parts(some_sequences, flat, count, backward)

    fused = compiled(eager_pooling)
    sides = {
        OURS: Side(ours, flat_places),
        "adajudge_kernels padded": Side(ours_padded, padded, batch.flat),
        "eager": Side(lambda *states: eager_pooling(states, *others, *masks), padded, batch.flat),
        "eager products": Side(
            lambda *states: eager_pooling_as_products(states, *others, *masks), padded, batch.flat
        ),
        "torch.compile": Side(lambda *states: fused(states, *others, *masks), padded, batch.flat),
        **{backend: Side(functools.partial(forced, backend), flat_places) for backend in GPU_BACKENDS},
    }
    if not batch.layout.shares_prompts:
        sides["eager packed"] = Side(
            lambda *states: eager_packed_pooling(states, *others, sequence, response, last), flat_places
        )
    moved = sum(x.nbytes for x in flat)
    return Case(
        group=group,
        shape=f"T={batch.rows} B={count} d={width} K={depths}",
        dtype=dtype,
        device=device,
        sides=sides,
        exact=exact,
        tokens=batch.useful_tokens,
        forward_bytes=moved,
        backward_bytes=3 * moved,
    )


def case_of(group, draw_batch, size, width, depths, dtype, device):
    return functools.partial(pooling_case, group, draw_batch, size, width, depths, dtype, device)


def skip_unless_here(side):
    reason = ak.backends.unavailable_reason(side, "pooling") if side in GPU_BACKENDS else None
    if reason is not None:
        pytest.skip(f"{side}: {reason}")


@pytest.mark.parametrize("side", [OURS, "eager", "eager products", "torch.compile"])
@backwards
@both_dtypes
def test_cpu_pooling(measured, dtype, backward, side, device):
    if device.type != "cpu":
        pytest.skip("a case of CPUs")
    measured(
        case_of("pooling, equal lengths", equal_lengths, (8, 1024), 2048, 3, dtype, device), side, backward
    )


@pytest.mark.parametrize("side", [OURS, "eager", "eager products", "torch.compile", *GPU_BACKENDS])
@backwards
@both_dtypes
def test_gpu_pooling(measured, dtype, backward, side, device):
    if device.type != "cuda":
        pytest.skip("a case of GPUs")
    skip_unless_here(side)
    measured(
        case_of("pooling, equal lengths", equal_lengths, (32, 1024), 4096, 3, dtype, device), side, backward
    )


@pytest.mark.parametrize("side", [OURS, "eager", "eager packed"])
@backwards
def test_pooling_over_tokens(measured, tokens, backward, side, chosen, device):
    dtype = chosen.dtypes[-1]
    measured(
        case_of("pooling, packed", ragged, (tokens,), chosen.width, chosen.depths, dtype, device),
        side,
        backward,
    )


@pytest.mark.parametrize("side", [OURS, "eager"])
@backwards
def test_pooling_of_other_widths(measured, pooled, backward, side, chosen, device):
    width, depths = pooled
    dtype = chosen.dtypes[-1]
    measured(
        case_of("pooling, packed", ragged, (chosen.usual_tokens,), width, depths, dtype, device),
        side,
        backward,
    )


@pytest.mark.parametrize("side", [OURS, "adajudge_kernels padded", "eager"])
@backwards
def test_pooling_of_shared_prompts(measured, backward, side, chosen, device):
    """Six responses to each prompt; the other sides read a prompt once for each."""
    prompts = max(1, chosen.usual_tokens // 2048)
    dtype = chosen.dtypes[-1]
    case = case_of(
        "pooling, shared prompts", six_candidates, (prompts,), chosen.width, chosen.depths, dtype, device
    )
    measured(case, side, backward)
