"""``python -m adajudge_kernels.tune``: measure on this GPU what serves best, and keep it for later processes.

Each pooling kernel is timed inside the operation that launches it, on a batch of random states, with every candidate of
`pooling.configurations.candidates`; what beats the default by more than two per cent goes into the measured file. Attention
is timed, forward and backward, beside that of the libraries that are installed, and the Triton kernels of each family beside
the CUDA C++ ones. Nothing is tuned during training or scoring.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adajudge_kernels.backends import fastest, unavailable_reason, use_backend
from adajudge_kernels.layers import ExpertCombination, default_num_heads
from adajudge_kernels.layout import SequenceLayout
from adajudge_kernels.loss.ops import focal_bradley_terry_loss
from adajudge_kernels.measurements import measured_file
from adajudge_kernels.pooling import configurations
from adajudge_kernels.pooling.configurations import Tile
from adajudge_kernels.pooling.ops import PooledViews, depth_gate, masked_mean_pool, multi_view_pool
from adajudge_kernels.refinement import libraries
from adajudge_kernels.refinement.ops import sequence_attention

Measure = Callable[[Callable[[], object]], float]

_WORTH = 0.98  # of the default's time: less of a gain is noise


def operations(
    d: int, depths: int, dtype: torch.dtype, tokens: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """By kernel, a call of an operation that launches it."""
    count = max(1, tokens // 1024)
    packed = SequenceLayout.packed([512] * count, [512] * count, device)
    shared = SequenceLayout.shared_prompts([512] * count, [[128] * 4] * count, device)

    def random(*shape: int, gradient: bool = True) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(gradient)

    states = [random(packed.num_tokens, d) for _ in range(depths)]
    weight, bias = random(d), random(1)
    gate_weight, gate_bias = random(depths, d), random(depths)

    def pool(layout: SequenceLayout) -> Tensor:
        alpha = torch.full((layout.num_sequences, depths), 1 / depths, device=device)
        return torch.cat(multi_view_pool(states, alpha, weight, bias, layout))

    def gradients(output: Tensor, inputs: Sequence[Tensor]) -> Callable[[], object]:
        grad = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)

    found: dict[str, Callable[[], object]] = {
        "scan": torch.no_grad()(lambda: pool(packed)),
        "scan_backward": gradients(pool(packed), states),
        "sums": torch.no_grad()(lambda: depth_gate(states[0], gate_weight, gate_bias, packed)),
        "spread_means": gradients(masked_mean_pool(states[0], packed, "all"), states[:1]),
        "spread_attention": gradients(pool(shared), states),
    }
    if d > configurations.widest_row("scan_backward", depths, dtype):
        found["dots"] = found["scan_backward"]
    return found


def tune(
    d: int, depths: int, dtype: torch.dtype, calls: dict[str, Callable[[], object]], measure: Measure
) -> dict[str, Tile | None]:
    """The measured configurations by their key, None where the default does as well; prints a line for each kernel.

    Args:
        d, depths, dtype: of the rows.
        calls: as of `operations`.
        measure: milliseconds of a call; it may raise where a candidate cannot run.
    """
    found: dict[str, Tile | None] = {}
    for kernel, call in calls.items():
        # Kernels of one state are looked up under K = 1.
        own_depths = 1 if kernel in ("sums", "spread_means") else depths
        times: dict[Tile, float] = {}
        for candidate in configurations.candidates(kernel, d, own_depths, dtype):
            with configurations.forced_tile(kernel, candidate):
                try:
                    times[candidate] = measure(call)
                except Exception as error:  # out of registers or shared memory: triton has its own classes
                    reason = (str(error).splitlines() or [""])[0]
                    print(f"  {kernel} {candidate}: {type(error).__name__} {reason}", file=sys.stderr)
        default = configurations.default_tile(kernel, d, own_depths, dtype)
        if default not in times:
            raise RuntimeError(f"{kernel}: its default {default} does not run here")
        best = min(times, key=lambda candidate: times[candidate])
        gain = times[best] / times[default]
        print(f"{kernel:<18} default {times[default]:.4f} ms, best {times[best]:.4f} ms ({gain:.2f}): {best}")
        found[configurations.key(kernel, d, own_depths, dtype)] = best if gain < _WORTH else None
    return found


def write(found: dict[str, Tile | None]) -> str:
    """Put configurations into the measured file, and take out those that are None; returns its path."""
    known = {name: tile._asdict() for name, tile in configurations.measured_tiles().items()}
    merged = {name: tile for name, tile in known.items() if name not in found}
    merged |= {name: tile._asdict() for name, tile in found.items() if tile is not None}
    path = _write_file("tiles", merged)
    configurations.forget()
    return path


def _write_file(kind: str, entries: dict[str, Any]) -> str:
    path = measured_file(kind)
    assert path is not None  # a GPU is here
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    partial.replace(path)
    return str(path)


def tune_attention(
    heads: int, head_size: int, dtype: torch.dtype, tokens: int, device: torch.device, measure: Measure
) -> str:
    """Whose attention is the fastest, forward and backward, on packed sequences of 1024 tokens; prints a line for each.

    A library has to beat our own by more than two per cent.
    """
    count = max(1, tokens // 1024)
    layout = SequenceLayout.packed([512] * count, [512] * count, device)
    states = torch.randn(layout.num_tokens, 3, heads, head_size, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(layout.num_tokens, heads, head_size, device=device, dtype=dtype)
    times: dict[str, float] = {}
    for name in (libraries.OWN, *libraries.LIBRARIES):
        reason = libraries.unavailable_reason(name) or libraries.unserved_reason(
            name, states[:, 0], layout, "all"
        )
        if reason is not None:
            print(f"attention {name}: {reason}")
            continue
        with libraries.use_attention(name):
            try:
                times[name] = measure(
                    lambda: torch.autograd.grad(sequence_attention([states], layout), states, grad)
                )
            # Not built for this GPU, another head size ..: each library has its own classes.
            except Exception as error:
                if name == libraries.OWN:
                    raise
                print(f"attention {name}: {type(error).__name__} {(str(error).splitlines() or [''])[0]}")
                continue
        print(f"attention {name}: {times[name]:.4f} ms")
    best = min(times, key=lambda name: times[name])
    return best if times[best] < _WORTH * times[libraries.OWN] else libraries.OWN


def write_attention(found: dict[str, str]) -> str:
    """Put names of the fastest attention, by `libraries.key`, into their file; returns its path."""
    path = _write_file("attention", libraries.measured_attention() | found)
    libraries.measured_attention.cache_clear()
    return path


def backend_calls(
    d: int, depths: int, dtype: torch.dtype, tokens: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """By family that both backends serve, an operation forward and backward, on as many sequences as `tokens` are."""
    count = max(1, tokens // 1024)
    layout = SequenceLayout.packed([512] * count, [512] * count, device)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    states = [random(layout.num_tokens, d) for _ in range(depths)]
    alpha = torch.full((count, depths), 1 / depths, device=device)
    weight, bias = random(d), random(1)
    views = [random(count, d, dtype=torch.float32) for _ in range(4)]
    combination = ExpertCombination(d).to(device, dtype)
    chosen, rejected = (random(count, dtype=torch.float32) for _ in range(2))

    def pooling() -> object:
        pooled = multi_view_pool(states, alpha, weight, bias, layout)
        return torch.autograd.grad(torch.cat(pooled).sum(), [*states, weight])

    def experts() -> object:
        reward = combination(PooledViews(*views[:3]), views[3]).reward
        return torch.autograd.grad(reward.sum(), [*views, *combination.parameters()])

    def loss() -> object:
        return torch.autograd.grad(focal_bradley_terry_loss(chosen, rejected), [chosen, rejected])

    return {"pooling": pooling, "experts": experts, "loss": loss}


def tune_backends(shapes: Iterable[dict[str, Callable[[], object]]], measure: Measure) -> dict[str, str]:
    """The backend that serves each family in the least time, over all shapes; prints a line for each.

    Args:
        shapes: `backend_calls` of each shape.
        measure: milliseconds of a call.

    Returns:
        By family, ``"cuda"`` where it beats ``"triton"`` by more than two per cent, else ``"triton"``; empty where the CUDA
        C++ kernels cannot run.
    """
    reason = unavailable_reason("cuda")
    if reason is not None:
        print(f"backends: triton, as cuda cannot be used: {reason}")
        return {}
    times: dict[str, dict[str, float]] = {}
    for calls in shapes:
        for family, call in calls.items():
            of_family = times.setdefault(family, {"triton": 0.0, "cuda": 0.0})
            for backend in of_family:
                with use_backend(backend, families=(family,)):
                    of_family[backend] += measure(call)
    found = {}
    for family, of_family in times.items():
        found[family] = "cuda" if of_family["cuda"] < _WORTH * of_family["triton"] else "triton"
        print(
            f"{family:<18} triton {of_family['triton']:.4f} ms, cuda {of_family['cuda']:.4f} ms: {found[family]}"
        )
    return found


def write_backends(found: dict[str, str]) -> str:
    """Put the names of the fastest backends, by family, into their file; returns its path."""
    path = _write_file("backends", found)
    fastest.cache_clear()
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune the rows asked for; exit code 2 where there is no GPU or no triton."""
    parser = argparse.ArgumentParser(
        prog="python -m adajudge_kernels.tune",
        description=(__doc__ or "").split("\n\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--features", type=int, nargs="+", default=[2560, 4096], help="d; default 2560 4096")
    parser.add_argument("--depths", type=int, nargs="+", default=[3], help="K; default 3")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32768, help="of the batch that is measured")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("adajudge_kernels.tune: torch finds no GPU", file=sys.stderr)
        return 2
    try:
        from triton.testing import do_bench
    except ImportError:
        print("adajudge_kernels.tune: triton is not installed", file=sys.stderr)
        return 2
    dtype, device = getattr(torch, args.dtype), torch.device("cuda")
    for d in args.features:
        for depths in args.depths:
            print(f"d={d} K={depths} {args.dtype}, {args.tokens} tokens")
            with use_backend("triton", families=("pooling",)):
                calls = operations(d, depths, dtype, args.tokens, device)
                found = tune(d, depths, dtype, calls, lambda call: do_bench(call, return_mode="median"))
            kept = sum(tile is not None for tile in found.values())
            print(f"{kept} of {len(found)} beat the default; written to {write(found)}")
        heads = default_num_heads(d)
        with use_backend("triton", families=("refinement",)):
            best = tune_attention(heads, d // heads, dtype, args.tokens, device, do_bench)
        print(f"{best} is used; written to {write_attention({libraries.key(d // heads, dtype): best})}")
    # Last, with the tiles found above.
    shapes = [(d, depths, dtype, args.tokens, device) for d in args.features for depths in args.depths]
    by_family = tune_backends((backend_calls(*shape) for shape in shapes), do_bench)
    if by_family:
        print(f"used from now on; written to {write_backends(by_family)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
