"""``python -m benchmarks.report FILE``: the ratios of a benchmark run as a Markdown table."""

import json
import sys
from pathlib import Path


def table(path):
    """One line per group and dtype: both medians, their ratio, and the share of the read bandwidth that ours reaches.

    Where another side's case has timed ours between its own rounds, it is that median that its ratio is of.
    """
    run = json.loads(Path(path).read_text())
    groups = {}
    for case in run["benchmarks"]:
        key = case["group"], case["extra_info"].get("dtype")
        groups.setdefault(key, {})[case["params"]["side"]] = case
    lines = [
        "| case | adajudge_kernels | other side | ratio | share of read bandwidth |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (group, _), sides in groups.items():
        ours = sides.pop("adajudge_kernels")
        info = ours["extra_info"]
        case = group
        if "shape" in info:
            dtype = info["dtype"].removeprefix("torch.")
            case += f", {info['shape']}, {dtype}, {info['backend']} on {info['device']}"
        share = info.get("share_of_read_bandwidth")
        reached = "" if share is None else f"{100 * share:.0f} %"
        for name, other in sides.items():
            seconds = other["stats"]["median"]
            median = other["extra_info"].get("adajudge_kernels_seconds", ours["stats"]["median"])
            lines.append(
                f"| {case} | {_time(median)} | {name} {_time(seconds)} | {seconds / median:.2f}x | {reached} |"
            )
    return "\n".join(lines)


def _time(seconds):
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


if __name__ == "__main__":
    print(table(sys.argv[1]))
