"""`make cuts`: the stream between a runtime and a participant is cut at every byte of a batch.

See `tests/network/stream_cuts.py` for how it is done. A real participant with its barrier and a
real runtime run in this process; the connections between them go through a proxy of our own, which
cuts them. Cut are the replies to a batch of Execute, those to a batch of Compensate, and a batch of
calls: each after every number of bytes of its HTTP/2 frame, once by an RST and once by a FIN, and
all of it a second time with the bytes passing in crumbs of one to seven.

Progress goes to standard error; standard output has a table of the offsets and the cuts that
struck, the verdict, and as its last line one JSON object. Exit code: 0 when all sagas ended as
they should, every effect happened once and no offset was left out; 1 otherwise; 2 usage; 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import anyio
import structlog

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_options import whole  # noqa: E402  # the path comes first
from tests.network.proxy import Cut  # noqa: E402  # the path comes first
from tests.network.stream_cuts import (  # noqa: E402
    REPLIES,
    REQUESTS,
    UNDOINGS,
    Report,
    Target,
    opened,
)

TARGETS: Final = (REPLIES, UNDOINGS, REQUESTS)
CRUMBS: Final = (None, (1, 7))
MOST_SHOWN: Final = 10
MOST_BATCH: Final = 16
MOST_LANES: Final = 16
"""All of a batch wait in the participant until the last has its outcome, in each lane; these are as
many at once as a participant has places for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Cut as the arguments say; give the exit code."""
    parser = argparse.ArgumentParser(description="Cut streams at every byte of a batch.")
    parser.add_argument(
        "--batch",
        type=whole(1, MOST_BATCH),
        default=4,
        help="sagas that share a message; default %(default)s",
    )
    parser.add_argument(
        "--lanes",
        type=whole(1, MOST_LANES),
        default=4,
        help="streams that are cut side by side; default %(default)s",
    )
    parser.add_argument("--seed", type=int, help="of the crumbs; default: by chance")
    given = parser.parse_args(arguments)
    seed = secrets.randbelow(2**32) if given.seed is None else given.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    # A runtime logs each connection that breaks; here that is what is asked for.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    began_s = time.monotonic()
    try:
        reports = anyio.run(_cut_all, given.batch, given.lanes, seed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return _tell(reports, seed, time.monotonic() - began_s)


async def _cut_all(batch: int, lanes: int, seed: int) -> list[Report]:
    """Cut all there is; each time with a new runtime, whose call numbers are small."""
    return [
        await _cut(target, crumbs, batch, lanes, seed) for crumbs in CRUMBS for target in TARGETS
    ]


async def _cut(
    target: Target, crumbs: tuple[int, int] | None, batch: int, lanes: int, seed: int
) -> Report:
    with tempfile.TemporaryDirectory(prefix="amends-cuts-") as folder:
        async with opened(Path(folder), lanes=lanes, batch=batch, seed=seed, crumbs=crumbs) as cuts:
            await cuts.cut_everywhere(target, [*Cut])
            print(_line(cuts.report, target), file=sys.stderr, flush=True)
            return cuts.audit()


def _line(report: Report, target: Target) -> str:
    lengths = report.lengths[target.name]
    struck = sum(report.cuts[f"{target.name} by {cut.value}"] for cut in Cut)
    return (
        f"{target.name:<22}{max(lengths):>10,}{len(report.offsets[target.name]):>10,}"
        f"{struck:>8,}{max(report.members[target.name]):>10,}"
    )


def _tell(reports: Sequence[Report], seed: int, seconds: float) -> int:
    """Print the table, what was wrong, the verdict and the JSON line; give the exit code."""
    wrong = [line for report in reports for line in report.wrong]
    missing = 0
    for number, crumbs in enumerate(CRUMBS):
        how = "whole" if crumbs is None else f"in crumbs of {crumbs[0]} to {crumbs[1]} bytes"
        print(f"\nbytes pass {how}")
        print(f"{'cut inside':<22}{'frame':>10}{'offsets':>10}{'cuts':>8}{'in batch':>10}")
        first = number * len(TARGETS)
        for target, report in zip(TARGETS, reports[first:], strict=False):
            print(_line(report, target))
            missing += len(report.missing(target))
    print()
    for line in wrong[:MOST_SHOWN]:
        print(f"WRONG {line}")
    sagas = sum(report.sagas for report in reports)
    struck = sum(report.cuts.total() for report in reports)
    verdict = (
        f"{len(wrong)} things were wrong, {missing} offsets were left out"
        if wrong or missing
        else "nothing was lost, nothing doubled, and no offset was left out"
    )
    print(f"{struck:,} cuts, {sagas:,} sagas in {seconds:.0f} s: {verdict}")
    summary: dict[str, Any] = {
        "seed": seed,
        "cuts": struck,
        "sagas": sagas,
        "offsets": sum(len(each) for report in reports for each in report.offsets.values()),
        "offsets_left_out": missing,
        "wrong": len(wrong),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(summary))
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
