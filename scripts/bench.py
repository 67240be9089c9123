"""`make bench`: the benchmarks, by their command line.

Without a word more: a durable saga beside the same three calls made naively (`bench_naive.py`).

    --telemetry    what traces and metrics cost the runtime (`bench_telemetry.py`)
    --parts        where telemetry costs it, each part by itself (`bench_parts.py`)
    --micro        what each part of a saga costs by itself: deciding, storing, the wire, Exchange,
                   the client, the barrier (`bench_micro.py`)

Exit code: 0 when all was measured and every effect happened once; 1 otherwise; 2 usage, such as an
option that the chosen benchmark has no use for; 130 interrupted, by SIGINT or SIGTERM, and then no
process and no folder is left behind.

`make bench-scale` is the one of sizes and of bad days (`bench_scale.py`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from scripts import bench_micro, bench_naive, bench_parts, bench_telemetry
from scripts.bench_interrupt import interruptible
from scripts.bench_options import MOST_AT_ONCE, MOST_ROUNDS, add_output, seconds, whole
from scripts.bench_participant import PLANTS

USED: Final = {
    "": {"rounds", "seconds", "levels", "ways", "plant", "profile"},
    "--telemetry": {"rounds", "seconds", "ways", "profile"},
    "--parts": set[str](),
    "--micro": {"only"},
}
"""By benchmark: the options that it has a use for, besides --output."""


def main() -> int:
    """Parses the command line and does what it says."""
    options = _parsed()
    return interruptible(lambda: run(options))


def _parsed() -> argparse.Namespace:
    """What is asked for. Ends with a usage error if that makes no sense."""
    parser = _parser()
    options = parser.parse_args()
    chosen = next(
        (f"--{name}" for name in ("telemetry", "parts", "micro") if getattr(options, name)), ""
    )
    for name in sorted(set[str]().union(*USED.values()) - USED[chosen]):
        if getattr(options, name):
            where = " or ".join(one or "no other one" for one in USED if name in USED[one])
            parser.error(f"argument --{name}: goes with {where}, not with {chosen or 'none'}")
    known = [way.key for way in bench_telemetry.WAYS] if options.telemetry else bench_naive.WAYS
    if strange := set(options.ways) - {*known, *(["all"] if options.telemetry else [])}:
        parser.error(
            f"argument --ways: {', '.join(sorted(strange))} is none of {', '.join(known)}, which "
            f"are those {'with' if options.telemetry else 'without'} --telemetry"
        )
    if set(options.ways) == {"naive"}:
        parser.error(
            "argument --ways: there is nothing to compare the naive loop with: give unary or "
            "streaming, too"
        )
    return options


def run(options: argparse.Namespace) -> int:
    """Runs the benchmark that the options say. Answers the exit code."""
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
    parser.add_argument(
        "--rounds",
        type=whole(1, MOST_ROUNDS),
        help="how often each way is measured, the median counts; default 4",
    )
    parser.add_argument(
        "--seconds", type=seconds(), help="of each load; default 4 s, with --telemetry 3 s"
    )
    parser.add_argument(
        "--levels",
        type=whole(1, MOST_AT_ONCE),
        nargs="+",
        help="sagas at once, each by itself; default 100 300 1000",
    )
    add_output(parser, Path("build/bench.json"))
    parser.add_argument(
        "--profile", type=Path, help="write a cProfile of the runtime there; default: none"
    )
    benchmark = parser.add_mutually_exclusive_group()
    benchmark.add_argument("--telemetry", action="store_true", help="what traces and metrics cost")
    benchmark.add_argument(
        "--parts", action="store_true", help="what telemetry's parts cost, by themselves"
    )
    benchmark.add_argument("--micro", action="store_true", help="what the parts of a saga cost")
    parser.add_argument(
        "--plant",
        choices=PLANTS,
        default="",
        help="a fault of the participant, which the run must find; default: none",
    )
    keys = [way.key for way in bench_telemetry.WAYS]
    usual = [way.key for way in bench_telemetry.chosen([])]
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=[*bench_naive.WAYS, *keys, "all"],
        default=[],
        metavar="WAY",
        help=f"only these of {', '.join(bench_naive.WAYS)}, default all; with --telemetry, of "
        f"{', '.join(keys)}, or all, default {', '.join(usual)}",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(bench_micro.SCRIPTS),
        default=[],
        metavar="PART",
        help=f"with --micro, only these of {', '.join(bench_micro.SCRIPTS)}; default all",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
