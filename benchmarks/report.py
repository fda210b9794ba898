"""``python -m benchmarks.report FILE``: the ratios of a benchmark run as a Markdown table."""

import json
import sys
from pathlib import Path


def table(path):
    """One line per group: both medians, their ratio, and the share of the read bandwidth that ours reaches."""
    run = json.loads(Path(path).read_text())
    groups = {}
    for case in run["benchmarks"]:
        groups.setdefault(case["group"], {})[case["params"]["side"]] = case
    lines = [
        "| case | adajudge_kernels | other side | ratio | share of read bandwidth |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group, sides in groups.items():
        ours = sides.pop("adajudge_kernels")
        info, median = ours["extra_info"], ours["stats"]["median"]
        for name, other in sides.items():
            ratio = other["stats"]["median"] / median
            lines.append(
                f"| {group}, {info['shape']}, {info['dtype'].removeprefix('torch.')}, {info['backend']} on {info['device']} "
                f"| {1e3 * median:.1f} ms | {name} {1e3 * other['stats']['median']:.1f} ms | {ratio:.2f}x "
                f"| {100 * info['share_of_read_bandwidth']:.0f} % |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
