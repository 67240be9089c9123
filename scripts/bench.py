"""`make bench`: the benchmarks, by their command line.

Without a word more: a durable saga beside the same three calls made naively (`bench_naive.py`).

    --telemetry    what traces and metrics cost the runtime (`bench_telemetry.py`)
    --parts        where telemetry costs it, each part by itself (`bench_parts.py`)
    --micro        what each part of a saga costs by itself: deciding, storing, the wire, Exchange,
                   the client, the barrier (`bench_micro.py`)

`make bench-scale` is the one of sizes and of bad days (`bench_scale.py`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from scripts import bench_micro, bench_naive, bench_parts, bench_telemetry
from scripts.bench_participant import PLANTS


def main() -> int:
    """Parses the command line and does what it says."""
    parser = _parser()
    options = parser.parse_args()
    if not options.telemetry and set(options.ways) - set(bench_naive.WAYS):
        parser.error(f"these ways are of --telemetry: {', '.join(options.ways)}")
    if options.ways == ["naive"]:
        parser.error(
            "there is nothing to compare the naive loop with: give unary or streaming, too"
        )
    if options.parts:
        return bench_parts.run(options.output)
    if options.micro:
        return bench_micro.run(options.only, options.output)
    if options.telemetry:
        return bench_telemetry.run(
            bench_telemetry.chosen(options.ways),
            options.rounds or 4,
            options.seconds or 3.0,
            options.output,
            options.profile,
        )
    usual = bench_naive.Plan()
    plan = bench_naive.Plan(
        rounds=options.rounds or usual.rounds,
        seconds=options.seconds or usual.seconds,
        levels=tuple(options.levels or usual.levels),
        ways=tuple(options.ways or usual.ways),
        plant=options.plant,
        profile=options.profile,
    )
    return bench_naive.run(plan, options.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default 4")
    parser.add_argument("--seconds", type=float, help="of each load: default 4; with --telemetry 3")
    parser.add_argument("--levels", type=int, nargs="+", help="sagas at once: default 100 300 1000")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--profile", type=Path, help="write a cProfile of the runtime here")
    parser.add_argument("--telemetry", action="store_true", help="what traces and metrics cost")
    parser.add_argument("--parts", action="store_true", help="what its parts cost, by themselves")
    parser.add_argument("--micro", action="store_true", help="what the parts of a saga cost")
    parser.add_argument(
        "--plant", choices=PLANTS, default="", help="a fault of the participant: the run must fail"
    )
    keys = [way.key for way in bench_telemetry.WAYS]
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=[*bench_naive.WAYS, *keys, "all"],
        default=[],
        metavar="WAY",
        help=f"only these of {', '.join(bench_naive.WAYS)}; with --telemetry, of "
        f"{', '.join(keys)}, or all",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(bench_micro.SCRIPTS),
        default=[],
        metavar="PART",
        help=f"with --micro, only these of {', '.join(bench_micro.SCRIPTS)}",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
