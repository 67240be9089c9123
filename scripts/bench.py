"""`make bench`: what a durable saga costs, beside the same three calls made naively.

Two ways to do the same work, in alternation, on the same machine, against the same participant:

    naive    one process, 100 loops, each making three unary grpc.aio calls one after another;
             nothing is durable, nothing is retried, a crash loses everything
    amends   one process with 100 tasks, each `await client.start(..., wait_s=...)` of a saga of
             the same three steps; the runtime between them, its database on a real disk with real
             syncs

Closed loop: a loop begins its next piece of work when the last has ended. After it one at a time,
for the latency of a saga when nobody else is there. At the end the participant is asked for its
effects: each saga must have left each of its three exactly once, else the run fails.

Quote ratios: the machines are noisy, and the two alternate within one run because of that.
`--telemetry` measures something else: what traces and metrics cost, see `bench_telemetry.py`,
and `--parts` where they cost it, see `bench_parts.py`.
`participant`, `sink`, `naive` and `amends` are the processes that a benchmark starts; nobody else
needs to.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import grpc.aio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from amends.v1 import participant_pb2, participant_pb2_grpc
from scripts import bench_parts, bench_telemetry
from scripts.bench_processes import (
    CONCURRENCY,
    PAYLOAD,
    STEPS,
    Load,
    call_of,
    closed_loop,
    conditions,
    count_ended,
    cpu_seconds,
    effects_at,
    participant,
    participant_command,
    percentiles,
    process,
    register,
    run_load,
    runtime_command,
    through_amends,
    write_figures,
)
from scripts.bench_sink import sink


async def naive(address: str, tag: str, seconds: float, concurrency: int) -> Load:
    """Three unary calls, one after another, in as many loops as `concurrency`."""
    options = [("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = participant_pb2_grpc.ParticipantServiceStub(channel)

        async def one(number: int) -> None:
            result = PAYLOAD
            for step in STEPS:
                call = call_of(f"naive-{tag}-{number}", step, result)
                response = await stub.Execute(participant_pb2.ExecuteRequest(call=call), timeout=10)
                result = response.outcome.done.result.data

        return await closed_loop(one, seconds, concurrency)


# -- the run ---------------------------------------------------------------------------------------


def run(rounds: int, seconds: float, output: Path, profile: Path | None) -> int:
    """Alternates the two loads and writes `output`. Answers the exit code."""
    print(
        f"amends bench: {rounds} rounds of {seconds:g} s each way, then one at a time", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="amends-bench-") as name:
        folder = Path(name)
        measured_under = conditions(folder, rounds, seconds)
        figures, done = _measure(folder, rounds, seconds, profile)
        # The runtime has ended, which moved its log into the database.
        finished = count_ended(folder / "amends.db")
        disk = (folder / "amends.db").stat().st_size
    figures["disk_bytes_per_saga"] = round(disk / finished)
    figures["conditions"] = measured_under
    exact = figures["exact"] = _exact(figures, done, finished)
    write_figures(output, figures)
    _print_table(figures, output)
    return 0 if exact else 1


def _measure(
    folder: Path, rounds: int, seconds: float, profile: Path | None
) -> tuple[dict[str, Any], Counter[str]]:
    """Runs everything. Answers the figures, and how many sagas each way was told were done."""
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(process(folder, "participant", participant_command()))
        command = runtime_command(folder / "amends.db", worker["address"], profile)
        runtime = stack.enter_context(process(folder, "runtime", command))
        asyncio.run(register(runtime["address"]))
        addresses = {"naive": worker["address"], "amends": runtime["address"]}
        done: Counter[str] = Counter()

        def load(way: str, tag: str, seconds: float, concurrency: int) -> dict[str, Any]:
            before = [cpu_seconds(one["pid"]) for one in (worker, runtime)]
            result = run_load(way, addresses[way], f"{tag}-{os.getpid()}", seconds, concurrency)
            after = [cpu_seconds(one["pid"]) for one in (worker, runtime)]
            used = (result["cpu_s"], after[0] - before[0], after[1] - before[1])
            result["cpu_us"] = dict(
                zip(
                    ("load", "participant", "runtime"),
                    (round(seconds * 1e6 / result["sagas"]) for seconds in used),
                    strict=True,
                )
            )
            done[way] += result["sagas"]
            return result

        results: dict[str, list[dict[str, Any]]] = {way: [] for way in addresses}
        for way in addresses:  # connections, imports and caches are warm before anything is timed
            load(way, "warm", 1.0, CONCURRENCY)
        for number in range(rounds):
            for way in addresses:
                result = load(way, f"r{number}", seconds, CONCURRENCY)
                results[way].append(result)
                rate = result["sagas"] / result["seconds"]
                print(f"  round {number + 1}  {way:7} {rate:8.0f} sagas/s", flush=True)
        single = {way: load(way, "single", 3.0, 1) for way in addresses}
        figures = _figures(results, single)
        figures["effects"] = asyncio.run(effects_at(worker["address"]))
        return figures, done


def _figures(
    results: dict[str, list[dict[str, Any]]], single: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for way, rounds in results.items():
        rates = [done["sagas"] / done["seconds"] for done in rounds]
        latencies = [value for done in rounds for value in done["latencies_ms"]]
        figures[way] = {
            "sagas_per_s": round(statistics.median(rates), 1),
            "sagas_per_s_by_round": [round(rate, 1) for rate in rates],
            "sagas": sum(done["sagas"] for done in rounds),
            "cpu_us_per_saga": {
                name: round(statistics.median(done["cpu_us"][name] for done in rounds))
                for name in rounds[0]["cpu_us"]
            },
            "latency_ms": percentiles(latencies),
            "one_at_a_time_ms": percentiles(single[way]["latencies_ms"]),
        }
    pairs = zip(
        figures["amends"]["sagas_per_s_by_round"],
        figures["naive"]["sagas_per_s_by_round"],
        strict=True,
    )
    ratios = [ours / theirs for ours, theirs in pairs]
    figures["ratio"] = round(statistics.median(ratios), 3)
    figures["ratio_by_round"] = [round(ratio, 3) for ratio in ratios]
    figures["one_at_a_time_ratio"] = round(
        figures["amends"]["one_at_a_time_ms"]["p50"] / figures["naive"]["one_at_a_time_ms"]["p50"],
        2,
    )
    return figures


def _exact(figures: dict[str, Any], done: Counter[str], finished: int) -> bool:
    """Whether every piece of work left each of its effects once: neither lost nor doubled.

    `done` is what the loads were told, `finished` what the store holds; the effects are counted
    by the participant.
    """
    effects = figures["effects"]
    effects["expected"] = (done["naive"] + done["amends"]) * len(STEPS)
    return (
        effects["effects"] == effects["keys"] == effects["expected"]
        and effects["doubled"] == effects["undone"] == 0
        and finished == done["amends"]
    )


def _print_table(figures: dict[str, Any], output: Path) -> None:
    print(f"\n{'':22}{'naive':>10}{'amends':>10}{'ratio':>8}")
    ours, theirs = figures["amends"], figures["naive"]
    rows = [("sagas/s, 100 at once", theirs["sagas_per_s"], ours["sagas_per_s"], figures["ratio"])]
    for share in ("p50", "p95", "p99"):
        a, b = theirs["latency_ms"][share], ours["latency_ms"][share]
        rows.append((f"latency {share} ms", a, b, b / a))
    for share in ("p50", "p95"):
        a, b = theirs["one_at_a_time_ms"][share], ours["one_at_a_time_ms"][share]
        rows.append((f"one at a time {share} ms", a, b, b / a))
    for name, a, b, ratio in rows:
        print(f"{name:22}{a:>10}{b:>10}{ratio:>8.2f}")
    effects = figures["effects"]
    print(
        f"\neffects counted at the participant: {effects['effects']}, doubled {effects['doubled']}"
    )
    print(f"fdatasync of 4 KiB: {figures['conditions']['fdatasync_us']} µs")
    print(f"disk per saga {figures['disk_bytes_per_saga']} bytes")
    for way in ("naive", "amends"):
        used = ", ".join(f"{name} {us}" for name, us in figures[way]["cpu_us_per_saga"].items())
        print(f"{way}: CPU per saga in µs: {used}")
    print(f"{'exact' if figures['exact'] else 'NOT EXACT: the run fails'}; written to {output}")


def main() -> int:
    """Parses the command line and does what it says."""
    options = _parser().parse_args()
    match options.command:
        case "participant":
            asyncio.run(participant(options.ready_file, options.otlp, options.service))
        case "sink":
            asyncio.run(sink(options.ready_file, hangs=options.hangs))
        case "naive" | "amends" as way:
            load_of = naive if way == "naive" else through_amends
            load = load_of(options.address, options.tag, options.seconds, options.concurrency)
            print(json.dumps(asyncio.run(load)))
        case _ if options.parts:
            return bench_parts.run(options.output)
        case _ if options.telemetry:
            return bench_telemetry.run(
                bench_telemetry.chosen(options.ways),
                options.rounds or 4,
                options.seconds or 3.0,
                options.output,
                options.profile,
            )
        case _:
            return run(options.rounds or 5, options.seconds or 6.0, options.output, options.profile)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default 5; with --telemetry 4")
    parser.add_argument("--seconds", type=float, help="of each load: default 6, or 3")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--profile", type=Path, help="write a cProfile of the runtime here")
    parser.add_argument("--telemetry", action="store_true", help="what traces and metrics cost")
    parser.add_argument("--parts", action="store_true", help="what its parts cost, by themselves")
    keys = [way.key for way in bench_telemetry.WAYS]
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=[*keys, "all"],
        default=[],
        metavar="WAY",
        help=f"with --telemetry, only these of {', '.join(keys)}; or all",
    )
    commands = parser.add_subparsers(dest="command", metavar="")
    worker = commands.add_parser("participant")
    worker.add_argument("ready_file", type=Path)
    worker.add_argument("--otlp", default="")
    worker.add_argument("--service", default="")
    collector = commands.add_parser("sink")
    collector.add_argument("ready_file", type=Path)
    collector.add_argument("--hangs", action="store_true")
    for way in ("naive", "amends"):
        load = commands.add_parser(way)
        load.add_argument("address")
        load.add_argument("tag")
        load.add_argument("seconds", type=float)
        load.add_argument("concurrency", type=int)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
