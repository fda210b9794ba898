"""Files as pytest-benchmark writes them, with figures that are made up."""

import json

from benchmarks.case import OURS

CPU = {"processor": "Made Up 1000", "cores": 2, "python": "3.11.7", "torch": "2.13.0"}
GPU = {**CPU, "gpu": "NVIDIA H200", "cuda": "12.8", "triton": "3.7.1"}


def benchmark(
    side,
    seconds,
    case="pooling, packed",
    work="forward",
    shape="T=4096 B=12 d=1024 K=3",
    source="pooling",
    **info,
):
    """An element of ``benchmarks``. Of `info`, None takes a key away."""
    moved = info.pop("moved", 24 << 20)
    bandwidth = info.pop("bandwidth", 12e9)
    written = {
        "case": case,
        "work": work,
        "device": "cpu",
        "threads": 2,
        "dtype": "bfloat16",
        "shape": shape,
        "backend": "cpu",
        "useful_tokens": 4096,
        "useful_tokens_per_second": 4096 / seconds,
        "bytes_that_must_move": moved,
        "multiply_adds": 0,
        "gigabytes_per_second": moved / seconds / 1e9,
        "bandwidth": bandwidth,
        "share_of_bandwidth": moved / seconds / bandwidth,
        "peak_bytes": 50 << 20,
        **info,
    }
    return {
        "group": f"{case}, {work}",
        "fullname": f"benchmarks/test_{source}.py::test_{source}[{side}]",
        "params": {"side": side},
        "stats": {"median": seconds},
        "extra_info": {key: value for key, value in written.items() if value is not None},
    }


def bare(side, seconds, group="eager cost of depth_gate, inference", source="eager_cost"):
    """One that says nothing of itself."""
    made = benchmark(side, seconds, source=source)
    return {**made, "group": group, "extra_info": {}}


def write(path, benchmarks, machine=CPU, **more):
    """The file."""
    path.write_text(
        json.dumps(
            {
                "machine_info": machine,
                "datetime": "2026-11-21T17:43:31.729002+00:00",
                "benchmarks": benchmarks,
                **more,
            }
        )
    )
    return path


def power_law(side, tokens, seconds, exponent, peak=None, peak_exponent=1, **info):
    """Entries at several T: `seconds` and `peak` bytes at the first, growing as powers of T."""
    return [
        benchmark(
            side,
            seconds * (t / tokens[0]) ** exponent,
            shape=f"T={t} B={t // 256} d=1024 K=3",
            peak_bytes=None if peak is None else peak * (t / tokens[0]) ** peak_exponent,
            **info,
        )
        for t in tokens
    ]


def suite(device="cpu", tokens=(1024, 4096, 16384)):
    """Much like the whole suite."""
    found = []
    for work, slow in (("forward", 1), ("forward + backward", 3)):
        common = {"work": work, "device": device}
        for case, shape, source in (
            ("pooling, equal lengths", "T=8192 B=8 d=2048 K=3", "pooling"),
            ("pooling, shared prompts", "T=5307 B=12 d=1024 K=3", "pooling"),
            ("depth gate", "T=4096 B=12 d=1024 K=3", "depth_gate"),
        ):
            for dtype in ("float32", "bfloat16") if "equal" in case else ("bfloat16",):
                for side, factor in ((OURS, 1), ("eager", 6.4), ("torch.compile", 2.2)):
                    seconds = 2.4e-3 * slow * factor
                    found.append(
                        benchmark(side, seconds, case, shape=shape, source=source, dtype=dtype, **common)
                    )
        for side, factor, power, peak in (
            (OURS, 1.0, 1.0, 3e5),
            ("eager", 7.0, 1.03, 4e7),
            ("eager packed", 3.0, 1.01, 2.5e7),
            ("torch.compile", 2.0, 0.98, 1e7),
        ):
            scale = tokens[0] / 1024 * slow * factor
            found += power_law(side, tokens, 6e-4 * scale, power, peak, 1.0, moved=6 << 20, **common)
        for part, cost in (("refinement stage", 1.0), ("whole head", 1.1)):
            for t in tokens:
                for side, factor in ((OURS, cost), ("eager", 1.4 * cost)):
                    made = benchmark(
                        *(side, factor * slow * t * 1e-5, part),
                        **{"shape": f"T={t} B={t // 256} d=256 K=3", "source": "head", "dtype": "float32"},
                        **{"moved": slow * (4096 * t + (5 << 20)), "multiply_adds": slow * t * 1_400_000},
                        **{"peak_bytes": int(factor * t * 20_000)},
                        **common,
                    )
                    found.append(made)
        for rows in (1, 16, 256):
            for dtype, size in (("float32", 4), ("bfloat16", 2)):
                for side, factor in ((OURS, 1), ("eager", 1.7 if dtype == "float32" else 0.8)):
                    moved = slow * 7 * 256 * 2048 * size
                    seconds = factor * slow * (3e-4 + 3e-5 * rows)
                    made = benchmark(
                        *(side, seconds, f"experts, B={rows}"),
                        **{"shape": f"B={rows} d=2048 h=256", "source": "experts", "dtype": dtype},
                        **{"moved": moved, "multiply_adds": slow * rows * 7 * 256 * 2048, **common},
                    )
                    found.append(made)
    for side, factor in ((OURS, 1), ("eager", 4.0), ("torch.compile", 1.5)):
        loss = {"shape": "N=4096", "source": "loss", "dtype": "float32", "moved": 131072, "device": device}
        found.append(benchmark(side, 8e-5 * factor, "loss, 4096 pairs", "forward + backward", **loss))
    for side, factor in (
        (OURS, 0.7),
        ("prompts not shared", 1),
        ("padded, arrival order", 2.1),
        ("backbone alone", 0.6),
    ):
        shape = "tiny, K=3, 6 prompts of 2000 tokens with six responses each"
        made = {"shape": shape, "source": "scoring", "device": device, "multiply_adds": 10**9}
        found.append(benchmark(side, 0.3 * factor, "scoring", "forward", **made))
    for side, seconds in ((OURS, 18e-6), ("torch.library operator", 28e-6), ("launches prepared", 12e-6)):
        found.append(bare(side, seconds))
    return found
