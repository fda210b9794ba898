"""Score parquet files with Ray Data: ``python examples/ray_score.py rows/ scores/ --model my_judge --actors 8 --gpus 1``.

On a cluster start it as a Ray job; alone it takes this machine. Needs ``pip install 'adajudge-kernels[ray]'``.
"""

import argparse

import ray.data
from adajudge.scoring.ray_data import score_dataset


def main() -> None:
    """Read, score, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", help="a parquet file, or a folder of them")
    parser.add_argument("output", help="a folder; every block becomes a file of its own")
    parser.add_argument(
        "--model", help="folder of a judge that every machine can read; default: the built-in one"
    )
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--cpus", type=float, help="of an actor; reading and writing need some too: actors that take "
                        "every CPU wait for rows forever")  # fmt: skip
    parser.add_argument("--gpus", type=float, help="of an actor")
    parser.add_argument("--batch_size", type=int, default=1024, help="rows")
    args = parser.parse_args()
    rows = ray.data.read_parquet(args.input)
    scored = score_dataset(
        rows,
        args.model,
        actors=args.actors,
        batch_size=args.batch_size,
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    scored.write_parquet(args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
