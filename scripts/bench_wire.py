"""What the wire costs the runtime: a call and its reply, translated and (de)serialised.

`bench_wire.py` measures the runtime's own share in a batch over the stream, beside what the same
takes when each call is a message of its own; gRPC itself is in neither. The call is the last of a
saga of three steps, with the input and two results of 200 bytes. CPU time of this thread, the
median of the rounds, in which all parts take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from amends.v1 import participant_pb2, types_pb2
from amends_runtime import wire
from amends_runtime.core.messages import Done
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import Verb
from amends_runtime.ports import Call, StoreIdentity
from scripts.bench_interrupt import interruptible
from scripts.bench_options import MOST_ROUNDS, add_output, whole
from scripts.bench_parts import Part, measured, print_parts
from scripts.bench_processes import PAYLOAD, write_figures

ROUNDS: Final = 15
BATCH: Final = 100
BATCHES: Final = 20
AT_MS: Final = 1_800_000_000_000
IDENTITY: Final = StoreIdentity("store", "incarnation", 7)


def parts() -> list[Part]:
    """Everything that is measured."""
    calls = [_call(number) for number in range(BATCH)]
    replies = participant_pb2.ExchangeResponse(
        replies=[
            participant_pb2.ExchangeReply(call_number=number, outcome=_outcome())
            for number in range(BATCH)
        ]
    ).SerializeToString()
    reply = participant_pb2.ExecuteResponse(outcome=_outcome()).SerializeToString()

    def batch_out() -> None:
        request = participant_pb2.ExchangeRequest()
        for number, call in enumerate(calls):
            wire.add_exchange_call(request, number, call, call.timeout_ms)
        request.SerializeToString()

    def batch_in() -> None:
        for one in participant_pb2.ExchangeResponse.FromString(replies).replies:
            wire.outcome_from_proto(one.outcome, Verb.EXECUTE)

    def calls_out() -> None:
        for call in calls:
            message = wire.call_to_proto(call, IDENTITY, AT_MS)
            participant_pb2.ExecuteRequest(call=message).SerializeToString()

    def replies_in() -> None:
        for _ in range(BATCH):
            message = participant_pb2.ExecuteResponse.FromString(reply)
            wire.outcome_from_proto(message.outcome, Verb.EXECUTE)

    return [
        _part("a call in a batch", batch_out),
        _part("  by itself", calls_out),
        _part("a reply in a batch", batch_in),
        _part("  by itself", replies_in),
    ]


def _part(name: str, one_batch: Callable[[], None]) -> Part:
    def work() -> None:
        for _ in range(BATCHES):
            one_batch()

    return Part(name, "µs a call", BATCH * BATCHES, work)


def _call(number: int) -> Call:
    return Call(
        saga_id=f"bench-{number}",
        definition_name="bench",
        step=2,
        step_name="three",
        participant="bench",
        action="three",
        verb=Verb.EXECUTE,
        round=1,
        attempt=1,
        timeout_ms=10_000,
        input=Payload(PAYLOAD),
        results=(("one", Payload(PAYLOAD)), ("two", Payload(PAYLOAD))),
    )


def _outcome() -> participant_pb2.Outcome:
    outcome = participant_pb2.Outcome(
        done=participant_pb2.Done(result=types_pb2.Payload(data=PAYLOAD))
    )
    assert wire.outcome_from_proto(outcome, Verb.EXECUTE) == Done(Payload(PAYLOAD))
    return outcome


def run(output: Path, rounds: int = ROUNDS) -> int:
    """Measures, prints a table, writes `output`."""
    print(f"what the wire costs the runtime; CPU of one thread, {rounds} rounds\n")
    rows = print_parts(measured(parts(), rounds))
    versions = {name: version(name) for name in ("amends", "protobuf")}
    write_figures(output, {"parts": rows, "rounds": rounds, "batch": BATCH, "versions": versions})
    print(f"\nwritten to {output}")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds",
        type=whole(1, MOST_ROUNDS),
        default=ROUNDS,
        help="whose median counts; default %(default)s",
    )
    add_output(parser, Path("build/bench-wire.json"))
    options = parser.parse_args()
    return interruptible(lambda: run(options.output, options.rounds))


if __name__ == "__main__":
    raise SystemExit(main())
