"""What a call costs over a stream: the SDK's server in a process, a bare client in this one.

`python -m scripts.bench_exchange`: for batches of 1, 16, 64 and 256 calls, with so many batches
under way at once, prints calls/s and the CPU time that a call takes on each side; and the same by
the unary verbs. Each round ends with a count of the effects at the participant, which must be
exact. The best of `ROUNDS` rounds counts, as other work on the machine only ever adds.

The client is not the runtime's: it sends one message again and again with new numbers, so that what
is left of the time is the participant's.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple, cast

import grpc
import grpc.aio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

import amends
from amends.v1 import participant_pb2 as pb
from amends.v1 import participant_pb2_grpc, types_pb2
from scripts.bench_interrupt import child, interruptible
from scripts.bench_options import MOST_ROUNDS, whole

BATCHES: Final = (1, 16, 64, 256)
UNDER_WAY: Final = 2
"""Batches at once: one is answered while the next is on its way."""
ROUNDS: Final = 5
ROUND_S: Final = 1.0
PAYLOAD: Final = b"x" * 200
TIMEOUT_MS: Final = 10_000
UNARY_AT_ONCE: Final = 64
HANDLERS: Final = ("plain", "waits")
OPTIONS: Final = [("grpc.enable_retries", 0)]


class Figures(NamedTuple):
    """What one round has shown."""

    calls_per_s: float
    client_us: float
    participant_us: float


# --------------------------------------------------------------------------------- the participant


def participate() -> None:
    """Be the participant: print the address, then for each line of stdin effects and CPU time."""
    bench = amends.Participant("bench", barrier=None)
    effects = 0

    async def plain(call: amends.Call) -> bytes:
        nonlocal effects
        effects += 1
        return PAYLOAD

    async def waits(call: amends.Call) -> bytes:
        nonlocal effects
        await asyncio.sleep(0)
        effects += 1
        return PAYLOAD

    bench.execute("plain", compensatable=False)(plain)
    bench.execute("waits", compensatable=False)(waits)

    async def main() -> None:
        async with amends.serve(bench) as server:
            sys.stdout.write(f"{server.address}\n")
            sys.stdout.flush()
            while await asyncio.to_thread(sys.stdin.readline):
                sys.stdout.write(f"{effects} {time.process_time()}\n")
                sys.stdout.flush()

    asyncio.run(main())


class Process:
    """The participant's process."""

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self._process = running
        assert self._process.stdout is not None
        self._said = self._process.stdout
        self.address = self._said.readline().strip()

    def count(self) -> tuple[int, float]:
        """Give the effects so far, and the CPU time in seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        effects, cpu_s = self._said.readline().split()
        return int(effects), float(cpu_s)

    def end(self) -> None:
        """Let it end, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


# -------------------------------------------------------------------------------------- the client


def call_of(action: str, saga: int) -> pb.Call:
    """Make a call as the runtime sends it on a stream."""
    return pb.Call(
        saga_id=f"saga-{saga:08d}",
        definition="bench",
        step="charge",
        action=action,
        verb=types_pb2.VERB_EXECUTE,
        round=1,
        attempt=1,
        input=types_pb2.Payload(data=PAYLOAD, content_type="application/octet-stream"),
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
    )


@asynccontextmanager
async def connected(
    address: str,
) -> AsyncIterator[participant_pb2_grpc.ParticipantServiceAsyncStub]:
    """Connect to the participant."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        yield participant_pb2_grpc.ParticipantServiceStub(channel)


async def over_stream(address: str, action: str, size: int) -> int:
    """Send batches for the length of a round; give the calls that were answered with an outcome."""
    async with connected(address) as stub:
        stream = stub.Exchange()
        hello = pb.ExchangeHello(store_id="bench", epoch=1, incarnation="1", participant="bench")
        await stream.write(pb.ExchangeRequest(hello=hello))
        granted = cast("pb.ExchangeResponse", await stream.read())
        assert granted.credits >= size * UNDER_WAY, "the batches are larger than what is granted"
        batch = pb.ExchangeRequest(
            calls=[
                pb.ExchangeCall(call=call_of(action, number), timeout_ms=TIMEOUT_MS)
                for number in range(size)
            ]
        )
        sent = done = answered = 0
        until_s = time.monotonic() + ROUND_S
        while answered < sent or time.monotonic() < until_s:
            while time.monotonic() < until_s and sent - answered <= size * (UNDER_WAY - 1):
                for member in batch.calls:
                    sent += 1
                    member.call_number = sent
                    member.call.saga_id = f"saga-{sent:08d}"
                await stream.write(batch)
            response = cast("pb.ExchangeResponse", await stream.read())
            answered += len(response.replies)
            done += sum(reply.HasField("outcome") for reply in response.replies)
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert done == sent, f"{sent} calls were sent, {done} have an outcome"
        return done


async def by_verbs(address: str, action: str) -> int:
    """Send unary calls for the length of a round; give how many."""
    done = 0
    async with connected(address) as stub:
        until_s = time.monotonic() + ROUND_S

        async def one_after_another(first: int) -> None:
            nonlocal done
            saga = first
            while time.monotonic() < until_s:
                call = call_of(action, saga)
                call.store_id, call.idempotency_key = "bench", f"bench/{call.saga_id}"
                await stub.Execute(pb.ExecuteRequest(call=call), timeout=TIMEOUT_MS / 1000)
                done += 1
                saga += UNARY_AT_ONCE

        await asyncio.gather(*map(one_after_another, range(UNARY_AT_ONCE)))
    return done


def measure(process: Process, action: str, size: int) -> Figures:
    """Measure one round; `size` 0 stands for the unary verbs. The effects must be exact."""
    effects, participant_s = process.count()
    client_s, began_s = time.process_time(), time.monotonic()
    work = over_stream(process.address, action, size) if size else by_verbs(process.address, action)
    calls = asyncio.run(work)
    client_s, took_s = time.process_time() - client_s, time.monotonic() - began_s
    effects_after, participant_after_s = process.count()
    if effects_after - effects != calls:
        raise SystemExit(f"{calls} calls were answered, {effects_after - effects} took effect")
    per_call = 1e6 / calls
    return Figures(
        calls / took_s, client_s * per_call, (participant_after_s - participant_s) * per_call
    )


def exchange_figures(rounds: int = ROUNDS) -> dict[tuple[str, int], Figures]:
    """Measure everything in turns; give the best by handler and calls in a batch (0: unary)."""
    best: dict[tuple[str, int], Figures] = {}
    command = [sys.executable, "-m", "scripts.bench_exchange", "--participate"]
    with child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        process = Process(running)
        for _ in range(rounds):
            for action in HANDLERS:
                for size in (0, *BATCHES):
                    figures = measure(process, action, size)
                    known = best.get((action, size), figures)
                    best[action, size] = Figures(
                        max(figures.calls_per_s, known.calls_per_s),
                        min(figures.client_us, known.client_us),
                        min(figures.participant_us, known.participant_us),
                    )
        process.end()
    return best


def main() -> int:
    """Measure and print, or be the participant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--participate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--rounds",
        type=whole(1, MOST_ROUNDS),
        default=ROUNDS,
        help="how often all is measured, the best counts; default %(default)s",
    )
    options = parser.parse_args()
    if options.participate:
        participate()
        return 0
    return interruptible(lambda: run(options.rounds))


def run(rounds: int) -> None:
    """Measure and print."""
    print(
        f"{'handler':8} {'calls a message':>16} {'calls/s':>9} {'client us':>10} {'server us':>10}"
    )
    for (action, size), found in exchange_figures(rounds).items():
        print(
            f"{action:8} {size or 'unary':>16} {found.calls_per_s:9,.0f} {found.client_us:10.1f} "
            f"{found.participant_us:10.1f}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
