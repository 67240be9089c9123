"""`bench_core.py`: what deciding costs, and the loop around it, part by part, in one process.

The work is a saga of three steps, one after another, with payloads of 200 bytes: four turns. Each
part of it by itself, then all of it as a runtime does it: the supervisor, the turn loop, timers and
mailboxes, and what observers are told, over a store that holds nothing and an outbox that answers
each call with Done in the next round of the event loop. So neither SQLite nor a wire is in these
figures. CPU time of this thread, in µs per saga: the median of `ROUNDS` rounds in which all parts
take turns; and what a turn leaves in memory until it is durable.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import statistics
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio.lowlevel
import structlog

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.mailbox import Envelope
from amends_runtime.actors.saga_actor import SagaActor, call_for
from amends_runtime.actors.supervisor import Limits, Outbox, StartRequest, Supervisor
from amends_runtime.clock import SystemClock
from amends_runtime.core.definition import Definition, Plan, Step
from amends_runtime.core.effects import CallParticipant, PollParticipant, WithdrawCall
from amends_runtime.core.messages import (
    Answered,
    CancelSaga,
    Done,
    Message,
    Rejected,
    StartSaga,
    Unknown,
    Wake,
)
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    AttemptStarted,
    SagaEnded,
    SagaStarted,
    SagaState,
    StepExecuted,
    Timing,
    Verb,
)
from amends_runtime.core.saga import Decision, Saga, decide, fold
from amends_runtime.core.tracing import Tracing
from amends_runtime.ports import Call, LoadedSaga, Observer, Tombstone, Transition
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.telemetry.collector import Answer, Taken
from amends_runtime.telemetry.metrics import Metrics
from amends_runtime.telemetry.observers import HistoryLog, Observers
from amends_runtime.telemetry.spans import Span
from amends_runtime.telemetry.traces import Traces
from scripts.bench_interrupt import interruptible
from scripts.bench_options import MOST_ROUNDS, add_output, whole

__all__ = ["Figure", "Memory", "measure", "measure_memory"]

ROUNDS: Final = 15
SAGAS: Final = 400  # in each round of each part: some milliseconds
TOGETHER: Final = 100  # sagas under way at once, in the loop
AT_MS: Final = 1_800_000_000_000
INPUT: Final = Payload(b"x" * 200)
RESULT: Final = Payload(b"y" * 200)
STEPS: Final = ("one", "two", "three")
TURNS: Final = len(STEPS) + 1

PLAN: Final = Plan(
    Definition(
        name="bench",
        steps=tuple(Step(name=name, participant="bench", action="act") for name in STEPS),
    )
)


class Figure(NamedTuple):
    """A part, and what it took in each round, in µs of CPU per saga."""

    part: str
    us: Sequence[float]

    @property
    def median(self) -> float:
        """What it usually took."""
        return statistics.median(self.us)


class Memory(NamedTuple):
    """What one turn holds until it is durable: of its decision, its transition and its message."""

    turn: str
    blocks: float
    bytes: float
    tracked: float
    """How many of these objects the garbage collector has to look at."""


class Turn(NamedTuple):
    """One turn of the pattern: a message, the state before it, and what was decided."""

    before: Saga | None
    message: Message
    decision: Decision


def answered(step: int, outcome: Done | Rejected | Unknown, verb: Verb = Verb.EXECUTE) -> Answered:
    """A participant's answer to a step's first attempt, two milliseconds after it was sent."""
    return Answered(
        step=step,
        verb=verb,
        round=1,
        attempt=1,
        sent_at_ms=AT_MS,
        answered_at_ms=AT_MS + 2,
        status="OK",
        polls=0,
        outcome=outcome,
        sent_us=17,
        answered_us=400,
    )


START: Final = StartSaga(saga_id="bench-0", content_hash="c", input=INPUT)
DONE: Final = tuple(answered(step, Done(RESULT)) for step in range(len(STEPS)))


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """What these messages come to, one after another."""
    turns: list[Turn] = []
    saga: Saga | None = None
    for number, message in enumerate(messages):
        decision = decide(PLAN, saga, message, AT_MS + 2 * number, 1)
        turns.append(Turn(saga, message, decision))
        saga = decision.saga
    return turns


PATTERN: Final = turns_of([START, *DONE])
UNDONE: Final = turns_of(
    [
        START,
        *DONE[:2],
        answered(2, Rejected("no")),
        answered(1, Done(), Verb.COMPENSATE),
        answered(0, Done(), Verb.COMPENSATE),
    ]
)
RECORDS: Final = tuple(record for turn in PATTERN for record in turn.decision.records)


# -- parts by themselves ---------------------------------------------------------------------------


def deciding(turns: Sequence[Turn]) -> Callable[[], None]:
    """Decides these turns once for every saga."""

    def work() -> None:
        for _ in range(SAGAS):
            for before, message, _decision in turns:
                decide(PLAN, before, message, AT_MS, 1)

    return work


def one_message(turn: Turn, message: Message) -> Callable[[], None]:
    """Decides this message in a turn's state, once for every saga."""
    return deciding([Turn(turn.before, message, turn.decision)])


def folding() -> None:
    """Folds the histories."""
    for _ in range(SAGAS):
        fold(PLAN, RECORDS)


def making_records() -> None:
    """Makes the records, and nothing else."""
    for _ in range(SAGAS):
        SagaStarted(AT_MS, "bench-0", "bench", PLAN.content_hash, "c", INPUT, 0, {}, "")
        for step in range(len(STEPS)):
            AttemptStarted(AT_MS, step, Verb.EXECUTE, 1, 1, 1)
            timing = Timing(AT_MS, AT_MS + 2, "OK", 0, 0, 17, 400)
            StepExecuted(AT_MS, step, 1, 1, timing, RESULT)
        SagaEnded(AT_MS, SagaState.COMPLETED)


def acting() -> None:
    """Lets actors decide and become what they decided."""
    for number in range(SAGAS):
        actor = SagaActor("bench-0", number, PLAN, 1_024)
        for _, message, _decision in PATTERN:
            actor.mailbox.put_nowait(Envelope(message))
            actor.committed(actor.decide(actor.mailbox.take_nowait(), AT_MS, 1))


def calling() -> None:
    """Builds the calls."""
    tracing = Tracing("store", ratio=0.01)
    for _ in range(SAGAS):
        for _, _, decision in PATTERN:
            for effect in decision.effects:
                assert isinstance(effect, CallParticipant)
                call_for(PLAN, decision.saga, effect, tracing)


def answering() -> None:
    """Makes the answers, as a lane does."""
    for _ in range(SAGAS):
        for step in range(len(STEPS)):
            answered(step, Done(RESULT))


def observing(observer: Observer) -> Callable[[], None]:
    """Tells an observer of everything."""

    def work() -> None:
        for _ in range(SAGAS):
            for before, _, decision in PATTERN:
                observer.turn_committed(PLAN, before, decision.saga, decision.records)

    return work


def observers() -> Observers:
    """All that a runtime has by default, with traces sampled at 1 % (none of these sagas is)."""
    return Observers([HistoryLog(Tracing("store")), Metrics(), unsampled()])


class Nowhere:
    """A collector that is there, and that nothing comes to."""

    def send(self, spans: Sequence[Span]) -> Answer:
        """Takes them."""
        return Taken()

    def close(self) -> None:
        """Nothing is held."""


def unsampled() -> Traces:
    """Traces that keep none."""
    return Traces(
        Tracing("store", ratio=0.0), MemoryStore(MemoryDisk()), Nowhere(), where="nowhere"
    )


# -- all of it -------------------------------------------------------------------------------------


class EmptyStore(MemoryStore):
    """A store that holds no sagas: what it is given to commit is gone when it is durable."""

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Lets others run, as a commit does."""
        await anyio.lowlevel.checkpoint()
        return 0

    async def load(self, saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        """There is none of them."""
        return {}


class Answering:
    """An outbox that lets each call be Done in the next round of the event loop, together."""

    def __init__(self) -> None:
        self.deliver: Callable[[str, Answered], None]
        self.asked = 0
        self._asked: list[tuple[str, int]] = []

    def submit(self, call: Call, started_at_ms: int) -> None:
        """Takes a call."""
        self.asked += 1
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._answer)
        self._asked.append((call.saga_id, call.step))

    def _answer(self) -> None:
        asked, self._asked = self._asked, []
        for saga_id, step in asked:
            self.deliver(saga_id, DONE[step])

    def outbox(self) -> Outbox:
        """As the supervisor takes it."""

        def never(*_: object) -> None:
            raise AssertionError("nothing goes wrong here")

        def poll(call: Call, started_at_ms: int, poll: PollParticipant) -> None:
            never(call, poll)

        def withdraw(participant: str, saga_id: str, effect: WithdrawCall) -> None:
            never(effect)

        def holds(participant: str, saga_id: str, step: int, verb: Verb) -> bool:
            return True

        return Outbox(self.submit, poll, withdraw, never, holds)


class Whole:
    """A supervisor with all that is around it in a runtime, but for a store and lanes."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._answering = Answering()
        self._number = 0

    async def open(self, tasks: Any) -> None:
        """Begins its tasks."""
        store, clock, answering = EmptyStore(MemoryDisk()), SystemClock(), self._answering
        definitions = Definitions(store, clock, lambda: ["bench"])
        await definitions.register(PLAN.definition)
        self._supervisor = Supervisor(
            store,
            definitions,
            clock=clock,
            observer=self._observer,
            limits=Limits(),
            outbox=answering.outbox(),
            tracing=Tracing(store.identity.store_id, ratio=0.01),
        )
        answering.deliver = self._supervisor.deliver
        for part in (
            self._supervisor.run_decider,
            self._supervisor.run_committer,
            self._supervisor.run_timers,
            self._supervisor.run_loader,
        ):
            tasks.start_soon(part)

    async def work(self) -> None:
        """Lets sagas run, `TOGETHER` at a time, each to its end."""
        for _ in range(0, SAGAS, TOGETHER):
            requests = []
            for _ in range(TOGETHER):
                self._number += 1
                requests.append(
                    StartRequest(
                        saga_id=f"bench-{self._number}",
                        definition_name="bench",
                        content_hash="c",
                        input=INPUT,
                    )
                )
            await self._supervisor.start_sagas(requests)
            asked = self._number * len(STEPS)
            while self._answering.asked < asked:  # noqa: ASYNC110  # each round has work to do
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            await self._supervisor.wait_idle()


# -- measuring -------------------------------------------------------------------------------------

Work = Callable[[], None] | Callable[[], Awaitable[None]]


def parts() -> dict[str, Work]:
    """Everything that is measured by itself."""
    return {
        "decide: 4 turns": deciding(PATTERN),
        "  start": deciding(PATTERN[:1]),
        "  Done, the next step starts": deciding(PATTERN[1:2]),
        "  Done, the saga ends": deciding(PATTERN[3:]),
        "  an echo": one_message(PATTERN[2], DONE[0]),
        "  a wake-up for nothing": one_message(PATTERN[2], Wake()),
        "  unknown, retried": one_message(PATTERN[2], answered(1, Unknown("UNAVAILABLE"))),
        "  cancel": one_message(PATTERN[2], CancelSaga(author="a", reason="b")),
        "  refused at the end, undone": deciding(UNDONE),
        "the records alone": making_records,
        "fold: 8 records": folding,
        "SagaActor: 4 turns, mailbox": acting,
        "call_for: 3 calls": calling,
        "3 answers": answering,
        "observers": observing(observers()),
        "  log": observing(HistoryLog(Tracing("store"))),
        "  metrics": observing(Metrics()),
        "  traces, none sampled": observing(unsampled()),
    }


async def measure(rounds: int = ROUNDS) -> list[Figure]:
    """Lets all parts take turns, `rounds` times."""
    works = parts()
    wholes = {
        "the loop, all of it": Whole(observers()),
        "  without observers": Whole(Observers([])),
    }
    async with anyio.create_task_group() as tasks:
        for name, whole in wholes.items():
            await whole.open(tasks)
            works[name] = whole.work
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                began_s = time.thread_time()
                waiting = work()
                if waiting is not None:
                    await waiting
                times[name].append((time.thread_time() - began_s) / SAGAS * 1e6)
        tasks.cancel_scope.cancel()
    return [Figure(name, taken[1:]) for name, taken in times.items()]  # the first one warms up


def measure_memory() -> list[Memory]:
    """What turns hold until they are durable: one that begins, one that goes on, one that ends."""
    return [
        _memory_of("start", 0),
        _memory_of("Done, the next step starts", 1),
        _memory_of("Done, the saga ends", 3),
    ]


def _memory_of(name: str, number: int) -> Memory:
    message = PATTERN[number].message
    actors = [SagaActor("bench-0", 1, PLAN, 1_024) for _ in range(SAGAS)]
    for actor in actors:
        for turn in PATTERN[:number]:
            actor.committed(actor.decide(Envelope(turn.message), AT_MS, 1))

    def decided() -> list[object]:
        return [actor.decide(Envelope(message), AT_MS, 1) for actor in actors]

    held = decided()  # what is made once, is there
    del held
    gc.collect()
    gc.disable()
    try:
        blocks, tracked = sys.getallocatedblocks(), gc.get_count()[0]
        held = decided()
        blocks, tracked = sys.getallocatedblocks() - blocks, gc.get_count()[0] - tracked
        del held
        tracemalloc.start()
        size, held = tracemalloc.get_traced_memory()[0], decided()
        size = tracemalloc.get_traced_memory()[0] - size
        del held
    finally:
        tracemalloc.stop()
        gc.enable()
    return Memory(name, blocks / SAGAS, size / SAGAS, tracked / SAGAS)


def run(output: Path, rounds: int) -> int:
    """Measures, prints tables, writes `output`."""
    found = anyio.run(measure, rounds)
    print(f"µs of CPU per saga of {TURNS} turns, {rounds - 1} rounds of {SAGAS} sagas\n")
    print(f"{'':34}{'median':>10}{'least':>10}")
    for figure in found:
        print(f"{figure.part:34}{figure.median:>10.2f}{min(figure.us):>10.2f}")
    held = measure_memory()
    print(f"\n{'a turn holds until it is durable':34}{'blocks':>10}{'bytes':>10}{'tracked':>10}")
    for one in held:
        print(f"{one.turn:34}{one.blocks:>10.1f}{one.bytes:>10.0f}{one.tracked:>10.1f}")
    rows: list[Mapping[str, Any]] = [
        {"part": one.part.strip(), "us": [round(us, 3) for us in one.us]} for one in found
    ]
    versions = {name: version(name) for name in ("amends", "msgspec")}
    memory = [one._asdict() for one in held]
    figures = {"parts": rows, "memory": memory, "versions": versions}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {output}")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output(parser, Path("build/bench_core.json"))
    parser.add_argument(
        "--rounds",
        type=whole(2, MOST_ROUNDS),
        default=ROUNDS,
        help="whose median counts, the first left out; default %(default)s",
    )
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    return interruptible(lambda: run(arguments.output, arguments.rounds))


if __name__ == "__main__":
    sys.exit(main())
