"""A store that was put back, and the world around it: what it must not do, and how it comes right.

How to think about it. Three banks transfer money by two-phase commits. At some moment the store is
copied; life goes on; then the runtime dies, and the copy is put back. What happened in between is
*lost history*: the store has forgotten it, and the banks have not. Until an operator confirms the
store, new transfers run and what it brought with it is held back. Meanwhile runtimes come and go,
the banks ask about what they hold, and operators try everything. At last somebody compares,
confirms, and all ends.

The banks are honest and judge by the SDK's own barrier. The network loses and delays. What the
world knows of all histories, the lost ones too, is in `decided`, and is what the rules go by:

1.  While the store is unconfirmed no turn of a saga that it brought with it is written, nobody is
    called for one, and cancel, retry and abandon are refused (RESTORE_UNCONFIRMED).
2.  Until then nobody in doubt is told ABORT of what any history committed, nor COMMIT of what any
    aborted. A vote from before the restore is told UNKNOWN; so is whoever asks in the new
    incarnation's name about a saga that the store does not have, or that is held back.
3.  Otherwise who asks is told what the store has recorded: ABORT where it has no such saga, and
    UNKNOWN for ever about votes of an incarnation that it does not descend from.
4.  Transfers that the new incarnation has started end before anybody confirms.
5.  No bank commits what no history has decided to commit, or rolls back what none has decided to
    abort, unless it was told so by 3, or by hand.
6.  After the confirmation every saga of the store ends, and nothing is held any more, but by votes
    that are UNKNOWN for ever.
7.  COMPLETED is: all branches are committed, in one round. COMPENSATED is: none is, in any round;
    but a saga that was lost as a whole, and whose id is started again, knows nothing of branches
    and rounds that it does not come to. MIXED is only what has lost history, and something has been
    done otherwise than decided.
8.  A transfer that the store has lost altogether is committed by all or by none, if whoever
    confirmed has settled by hand what others had done.

1, 2, 3 and 6 are those of the semantics' section 5 ("a runtime on an empty or restored store must
not guess") and of "A store that was restored" in `docs/operating.md`; 4, 7 and 8 are what that page
promises of new transfers, of MIXED, and of its step 4.

Everything is drawn from one seed, and the same seed takes the same course.
"""

from __future__ import annotations

import asyncio
import copy
import random
import traceback
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, NamedTuple, TypeVar

import anyio
import grpc
import msgspec
from anyio.abc import TaskGroup

from amends.barrier.verdict import Replay, Row, Run, Write, judge, question_of, settle
from amends.outcomes import Call as BankCall
from amends.outcomes import Done, InProgress, Outcome, Rejected, Verb
from amends.v1 import participant_pb2
from amends.wire import (
    call_from_wire,
    call_of_resolver,
    essentials_of,
    outcome_from_wire,
    outcome_to_wire,
)
from amends_runtime import wire
from amends_runtime.actors.supervisor import Limits, StartRequest, Supervisor
from amends_runtime.actors.survey import Survey
from amends_runtime.api.deciding import Decisions
from amends_runtime.core.definition import Definition, Mode, Plan, RetryPolicy, Step, TwoPhase
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import (
    CommitDecision,
    DecisionMade,
    SagaState,
)
from amends_runtime.core.saga import Saga, fold
from amends_runtime.core.two_phase import LOCKED, decision_of
from amends_runtime.dispatch.status import reply_of
from amends_runtime.engine import Engine
from amends_runtime.errors import AmendsError, StoreError, WrongState
from amends_runtime.ports import (
    Call,
    LoadedSaga,
    OpenSaga,
    OperatorWords,
    ParticipantAddress,
    Reply,
    RestingSaga,
    Tombstone,
    Transition,
)
from amends_runtime.storage.memory import MemoryDisk, MemoryStore
from amends_runtime.telemetry.observers import Observers
from amends_runtime.testing.virtual_time import Stalled, VirtualClock
from tests.simulation.loop import Livelock, SimulatedLoop
from tests.simulation.trace import Trace, logs_into

__all__ = ["Played", "play"]

T = TypeVar("T")

BANKS: Final = ("east", "north", "west")
WORDS: Final = OperatorWords("ada", "compared", 1, "")

COMMIT, ABORT = CommitDecision.COMMIT, CommitDecision.ABORT
UNKNOWN, PENDING = CommitDecision.UNKNOWN, CommitDecision.PENDING

ARRIVES_S: Final = 10.0  # within this time whatever is on the wire has arrived
ASK_EVERY_S: Final = (1.0, 20.0, 150.0)  # a bank, about what it holds
ORDERED: Final = 0.3  # how many definitions ask for votes in order
LOCKED_RETRIES: Final = 0.3  # how many begin anew after LOCKED
CALM_S: Final = 900.0  # the longest deadlines, backoffs, polls and breakers, one after the other


class Played(msgspec.Struct, frozen=True):
    """What came of a seed: the rules that broke, how often things happened, and the whole trace."""

    seed: int
    violations: tuple[str, ...]
    seen: Counter[str]
    trace: Trace

    def __str__(self) -> str:
        lines = [f"seed {self.seed}", *self.trace.lines(), *self.violations]
        return "\n".join([*lines, f"to repeat: print(tests.simulation.restored.play({self.seed}))"])


class Life(NamedTuple):
    """One round of a branch; its keys at its bank."""

    saga_id: str
    step: str
    round: int


class Vote(msgspec.Struct, frozen=True):
    """What a bank holds, and what it keeps with it."""

    incarnation: str
    essentials: bytes


def play(seed: int) -> Played:
    """Play a seed to its end. Nothing is raised for what goes wrong in it."""
    loop = SimulatedLoop()
    asyncio.set_event_loop(loop)
    try:
        world = World(seed, loop)
        with logs_into(world.trace, lambda what: world.breaks("deciding never crashes", what)):
            try:
                loop.run_until_complete(world.live())
            except (Stalled, Livelock) as error:
                world.breaks("nothing hangs", str(error))
            except Exception as error:  # noqa: BLE001  # whoever reads it needs the seed and the course
                world.breaks("nothing raises", "".join(traceback.format_exception(error)))
            _end(loop)
        return Played(seed, tuple(world.violations), world.seen, world.trace)
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _end(loop: SimulatedLoop) -> None:
    """Nothing is left under way, however it came to its end."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))


# -- the banks -------------------------------------------------------------------------------------


class Bank:
    """A bank's database: its barrier's rows, what it holds for votes, what it has committed."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.held: dict[Life, Vote] = {}
        self.committed: set[Life] = set()
        self.rolled_back: set[Life] = set()
        self._world = world
        self._rows: dict[Life, dict[Verb, Row]] = {}

    def take(self, call: BankCall) -> Outcome:
        """Judge a call and carry it out, in one transaction."""
        life = Life(call.saga_id, call.step, call.round)
        rows = self._rows.setdefault(life, {})
        question = question_of(call)
        verdict = judge(question, rows)
        if isinstance(verdict, Replay):
            return outcome_from_wire(participant_pb2.Outcome.FromString(verdict.reply))
        if not isinstance(verdict, Run):
            if call.verb is Verb.COMPENSATE and verdict.writes:
                self.rolled_back.add(life)
            self._write(call, verdict.writes, verdict.outcome)
            return verdict.outcome
        outcome = self._world.vote_of(life) if call.verb is Verb.PREPARE else Done()
        self._write(call, settle(question, rows, outcome).writes, outcome)
        if call.verb is Verb.PREPARE:
            if isinstance(outcome, Done):
                self.held[life] = Vote(call.incarnation, essentials_of(call))
        else:
            self._world.check_carried_out(self, life, call)
            self.held.pop(life, None)
            (self.committed if call.verb is Verb.EXECUTE else self.rolled_back).add(life)
        return outcome

    def _write(self, call: BankCall, writes: Sequence[Write], outcome: Outcome) -> None:
        rows = self._rows[Life(call.saga_id, call.step, call.round)]
        for write in writes:
            if write.verb is call.verb:
                reply = outcome_to_wire(outcome).SerializeToString()
                rows[write.verb] = Row(write.state, question_of(call).request_hash, reply)
            else:
                rows[write.verb] = Row(write.state)

    def settle(self, life: Life, decision: CommitDecision) -> None:
        """Carry out what it was told about a vote, or what a person has found out."""
        verb = Verb.EXECUTE if decision is COMMIT else Verb.COMPENSATE
        self.take(call_of_resolver(self.held[life].essentials, verb))


class Endpoint:
    """A runtime's way to one bank: both directions lose and delay, and outlive the runtime."""

    def __init__(self, world: World, bank: Bank, store: Store) -> None:
        self.name = bank.name
        self._world, self._bank, self._store = world, bank, store

    async def call(self, call: Call) -> Reply:
        """Send, and wait for the answer until the deadline."""
        self._world.check_call(call)
        deadline_at_ms = self._world.clock.now_ms() + call.timeout_ms
        message = wire.call_to_proto(call, self._store.identity, deadline_at_ms)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._send(message, call, answer)
        with anyio.move_on_after(call.timeout_ms / 1000):
            return await answer
        return reply_of(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    async def close(self) -> None:
        """Nothing is open."""

    def _send(
        self, message: participant_pb2.Call, call: Call, answer: asyncio.Future[Reply]
    ) -> None:
        world = self._world
        there_s, back_s = world.chance.choice(WAYS_S), world.chance.choice(WAYS_S)
        fate = world.fate_of_call()
        loop = asyncio.get_running_loop()

        def reply(one: Reply) -> None:
            if not answer.done():
                answer.set_result(one)

        def arrive() -> None:
            outcome: Outcome = InProgress(world.chance.choice((0.1, 5.0)))
            if fate != "in progress":
                outcome = self._bank.take(call_from_wire(message))
            world.trace.add("  {} {} {} -> {}", self.name, call.verb.name, call.saga_id, outcome)
            if fate != "reply lost":
                said = wire.outcome_from_proto(outcome_to_wire(outcome), call.verb)
                loop.call_later(back_s, reply, Reply(said, "OK", healthy=True))

        if fate == "error":
            loop.call_later(back_s, reply, reply_of(grpc.StatusCode.UNAVAILABLE, "away"))
        elif fate != "request lost":
            loop.call_later(there_s, arrive)


WAYS_S: Final = (0.001, 0.001, 0.01, 0.3, 4.0)
FATES: Final = ("in progress", "request lost", "reply lost", "error")


# -- the store -------------------------------------------------------------------------------------


class Store(MemoryStore):
    """The memory store; some reads fail, and each decision that is written is noted."""

    def __init__(self, world: World) -> None:
        super().__init__(world.disk)
        self._world = world

    async def commit(self, transitions: Sequence[Transition]) -> int:
        """Commit turns."""
        for transition in transitions:
            if transition.saga_no <= self.unconfirmed_through_no:
                self._world.breaks(
                    "nothing is written of what is held back", f"{transition.records}"
                )
        try:
            return await super().commit(transitions)
        finally:  # also one that failed and was written all the same
            for transition in transitions:
                self._note(transition)

    def _note(self, transition: Transition) -> None:
        turns = self.disk.history.get(transition.saga_no, [])
        if transition.version > len(turns):
            return
        saga_id = self.disk.sagas[transition.saga_no].saga_id
        records = turns[transition.version - 1].records
        self._world.trace.add("{} wrote {}", saga_id, records)
        for record in records:
            if isinstance(record, DecisionMade):
                self._world.decided[saga_id, record.round].add(record.decision)

    async def load(self, saga_ids: Sequence[str]) -> dict[str, LoadedSaga | Tombstone]:
        """Histories."""
        self._may_fail()
        return await super().load(saga_ids)

    async def open_sagas(self, state: SagaState, after_no: int, limit: int) -> list[OpenSaga]:
        """A page of recovery."""
        self._may_fail()
        return await super().open_sagas(state, after_no, limit)

    async def resting_sagas(
        self, after: RestingSaga | None, until_ms: int, limit: int, updated_after_ms: int = 0
    ) -> list[RestingSaga]:
        """A page of those that the horizon comes to."""
        self._may_fail()
        return await super().resting_sagas(after, until_ms, limit, updated_after_ms)

    def _may_fail(self) -> None:
        if self._world.chance.random() < self._world.reads_fail:
            raise StoreError("a read failed, as planned")


def copied(disk: MemoryDisk) -> MemoryDisk:
    """A backup: what is on the disk at this moment."""
    backup = MemoryDisk()
    for name, value in vars(disk).items():
        setattr(backup, name, copy.copy(value))
    backup.history = {saga_no: [*turns] for saga_no, turns in disk.history.items()}
    return backup


# -- the world -------------------------------------------------------------------------------------


class World:
    """Everything there is, and its course."""

    def __init__(self, seed: int, loop: SimulatedLoop) -> None:
        self.chance = chance = random.Random(seed)  # noqa: S311  # to be repeated
        self.clock = VirtualClock(loop)
        self.trace = Trace(loop.time)
        self.violations: list[str] = []
        self.seen: Counter[str] = Counter()
        self.disk = MemoryDisk()
        self.disk.store_id, self.disk.incarnation = "store", "incarnation 0"
        self.banks = {name: Bank(self, name) for name in BANKS}
        self.decided: defaultdict[tuple[str, int], set[CommitDecision]] = defaultdict(set)
        self.presumed: set[tuple[str, int]] = set()  # rounds of which somebody was told ABORT
        self.has_lost: set[str] = set()  # sagas of whose history something was lost
        self.by_hand: set[tuple[str, int]] = set()
        self.reads_fail = 0.0
        self._trouble = chance.choice((0.0, 0.1, 0.3))
        self._limits = Limits(
            park_after_ms=chance.choice((0, 1_000, 60_000)),
            live_sagas=chance.choice((4, 1_000, 1_000)),
        )
        self._definitions = [self._definition(number) for number in range(4)]
        self._flows: dict[str, Definition] = {}  # by saga
        self._votes: dict[Life, Outcome] = {}
        self._engine: Engine | None = None
        self._tasks: TaskGroup | None = None

    def _definition(self, number: int) -> Definition:
        chance = self.chance
        retry = RetryPolicy(
            first_ms=chance.choice((100, 1_000, 60_000)),
            factor=1.0,
            max_ms=60_000,
            give_up_after_ms=chance.choice((1_000, 10**8)),
        )
        banks = chance.sample(BANKS, chance.choice((2, 3)))
        return Definition(
            name=f"transfer-{number}",
            mode=Mode.TWO_PHASE_COMMIT,
            two_phase=TwoPhase(
                ordered=chance.random() < ORDERED,
                locked_retries=2 if chance.random() < LOCKED_RETRIES else 0,
            ),
            deadline_ms=chance.choice((2_000, 30_000, 300_000)),
            steps=tuple(
                Step(
                    name=bank,
                    participant=bank,
                    action="move",
                    retry=retry,
                    compensation_retry=retry,
                )
                for bank in banks
            ),
        )

    def vote_of(self, life: Life) -> Outcome:
        """A bank's vote, drawn once."""
        if life not in self._votes:
            drawn = self.chance.random()
            refusal = "" if drawn < 0.8 else LOCKED if drawn < 0.9 else "declined"
            self._votes[life] = Rejected(refusal) if refusal else Done()
        return self._votes[life]

    def fate_of_call(self) -> str:
        """What becomes of a call, other than that it arrives and is answered."""
        if self.chance.random() < self._trouble:
            return self.chance.choice(FATES)
        return ""

    def breaks(self, rule: str, what: str) -> None:
        """A rule does not hold."""
        self.violations.append(f"{rule}: {what}")
        self.trace.add("VIOLATION {}: {}", rule, what)

    # -- its course ------------------------------------------------------------------------------

    async def live(self) -> None:
        """Eras, each of which ends with a restore; then a calm, and the audit."""
        async with anyio.create_task_group() as outside:
            outside.start_soon(self._banks_ask)
            backups = [await self._era(lives=self.chance.choice((1, 2)))]
            for _ in range(self.chance.choice((1, 1, 1, 2))):
                await self._put_back(copied(self.chance.choice(backups)))
                backups.append(await self._era(lives=self.chance.choice((1, 2, 3))))
            await self._come_right()
            outside.cancel_scope.cancel()

    async def _era(self, lives: int) -> MemoryDisk:
        """Some lives of the runtime, all of which end in death. The backup is of one moment."""
        copy_in = self.chance.randrange(lives)
        backup = self.disk
        for number in range(lives):
            self._trouble = self.chance.choice((0.0, 0.1, 0.3))
            self.reads_fail = self.chance.choice((0.0, 0.0, 0.2))
            async with self._a_runtime() as (engine, tasks):
                operations = self.chance.randrange(4, 16)
                copy_at = self.chance.randrange(operations)
                for n in range(operations):
                    if number == copy_in and n == copy_at:
                        await self._begin_some(engine, tasks)
                        self.trace.add("backup")
                        backup = copied(self.disk)
                    await self._operate(engine, tasks)
                await self._begin_some(engine, tasks)
        return backup

    async def _put_back(self, backup: MemoryDisk) -> None:
        """The backup becomes the truth; but first whatever was on the wire arrives."""
        await anyio.sleep(ARRIVES_S)
        for saga_id, saga_no in self.disk.saga_nos.items():
            kept = backup.history.get(backup.saga_nos.get(saga_id, 0), ())
            if kept != self.disk.history[saga_no]:
                self.has_lost.add(saga_id)
                self.seen["history lost" if kept else "saga lost"] += 1
        self.disk = backup
        self.disk.take_fault()
        self.disk.mark_restored()
        self.seen["restored"] += 1
        self.disk.incarnation = f"incarnation {self.seen['restored']}"  # the same in every run
        self.trace.add("restored through {}", self.disk.restored_through_no)

    @asynccontextmanager
    async def _a_runtime(self) -> AsyncIterator[tuple[Engine, TaskGroup]]:
        """A runtime, for the length of a block; then it is dead."""
        store = Store(self)
        self.trace.add("runtime {}", store.identity.epoch)
        engine = Engine(
            store,
            clock=self.clock,
            observer=Observers([]),
            connect=lambda address, _: Endpoint(self, self.banks[address.name], store),
            limits=self._limits,
        )
        await engine.load()
        async with anyio.create_task_group() as tasks:
            engine.open(tasks, [ParticipantAddress(name, "nowhere") for name in BANKS])
            engine.run(tasks)
            self._engine, self._tasks = engine, tasks
            yield engine, tasks
            self._engine = self._tasks = None
            if engine.failed:
                self.breaks("a runtime lives until it is killed", str(engine._failure))
            tasks.cancel_scope.cancel()
            self.trace.add("it dies")
        await engine.lanes.close()  # what of it would still happen

    # -- clients and operators -------------------------------------------------------------------

    async def _begin_some(self, engine: Engine, tasks: TaskGroup) -> None:
        """Transfers, which are soon somewhere between their start and their end."""
        for _ in range(self.chance.choice((0, 1, 3))):
            self._begin_new(engine, tasks)
        await anyio.sleep(self.chance.choice((0.0, 0.0015, 0.005, 0.012, 0.3, 4.0, 40.0)))

    def _begin_new(self, engine: Engine, tasks: TaskGroup) -> None:
        saga_id = f"t-{len(self._flows)}"
        self._flows[saga_id] = self.chance.choice(self._definitions)
        tasks.start_soon(self._begin, engine, saga_id)

    async def _operate(self, engine: Engine, tasks: TaskGroup) -> None:
        """Somebody does something, and waits for no answer."""
        supervisor, chance = engine.supervisor, self.chance
        saga_id = chance.choice([*self._flows, "new"])
        match chance.randrange(10):
            case 0 | 1 | 2:
                self._begin_new(engine, tasks)
            case 3 if saga_id in self._flows:
                tasks.start_soon(self._begin, engine, saga_id)
            case 4:
                asked: Callable[[], Awaitable[object]] = chance.choice(
                    (
                        lambda: supervisor.cancel_saga(saga_id, "ann", "late"),
                        lambda: supervisor.retry_saga(saga_id, None, "ann", "now"),
                        lambda: supervisor.abandon_saga(saga_id, "ann", "lost", force=True),
                    )
                )
                tasks.start_soon(self._move, saga_id, asked)
            case 5:
                tasks.start_soon(self._quietly, lambda: supervisor.wait(saga_id, 60))
            case 6:
                tasks.start_soon(self._ask_by_hand, engine, saga_id)
            case 7 if chance.random() < 0.3:
                self.disk.fail_next_commit(written=chance.random() < 0.5)
            case 8 if self.disk.restored and chance.random() < 0.2:
                await self._confirm(supervisor)
            case _:
                await anyio.sleep(chance.choice((0.001, 0.02, 0.5, 5.0, 40.0)))

    async def _quietly(self, asked: Callable[[], Awaitable[T]]) -> T | None:
        """What was asked, unless it was refused, or the store was in trouble."""
        try:
            return await asked()
        except AmendsError as error:
            self.trace.add("refused: {}", str(error))
            return None

    async def _begin(self, engine: Engine, saga_id: str) -> None:
        definition = self._flows[saga_id]
        if self.disk.restored and saga_id in self.has_lost:
            self.seen["started again"] += 1

        async def begin() -> None:
            await engine.definitions.register(definition)
            await engine.supervisor.start_saga(
                StartRequest(
                    saga_id=saga_id,
                    definition_name=definition.name,
                    content_hash="c",
                    input=Payload(b"in"),
                )
            )

        await self._quietly(begin)

    async def _move(self, saga_id: str, asked: Callable[[], Awaitable[object]]) -> None:
        """Rule 1: nobody moves what is held back."""
        try:
            await asked()
        except WrongState as refusal:
            self.seen[f"refused: {refusal.reason}"] += 1
            if self._is_held_back(saga_id) and refusal.reason != "RESTORE_UNCONFIRMED":
                self.breaks("it is refused for the restore", f"{saga_id}: {refusal.reason}")
        except AmendsError:
            pass
        else:
            if self._is_held_back(saga_id):
                self.breaks("what is held back cannot be moved", saga_id)

    def _is_held_back(self, saga_id: str) -> bool:
        """By the disk alone."""
        saga_no = self.disk.saga_nos.get(saga_id, 0)
        is_old = self.disk.restored and 0 < saga_no <= self.disk.restored_through_no
        return is_old and not self.disk.sagas[saga_no].ended_at_ms

    async def _confirm(self, supervisor: Supervisor) -> None:
        """Compare, settle by hand what the store cannot know, and say that it is the truth."""
        lost_only = self.chance.random() < 0.5
        while self.disk.restored:
            self._settle_by_hand(lost_only=lost_only)
            self.trace.add("confirms")
            words = msgspec.structs.replace(WORDS, request_id=f"r-{self.chance.random()}")
            await self._quietly(lambda: supervisor.confirm_restore(words))  # noqa: B023
        self.seen["confirmed"] += 1

    def _settle_by_hand(self, *, lost_only: bool) -> None:
        """Whose vote is in doubt gets what others of its saga got."""
        for bank in self.banks.values():
            for life in [*bank.held]:
                if lost_only and life.saga_id in self.disk.saga_nos:
                    continue
                if any(_has(one.committed, life) for one in self.banks.values()):
                    found = COMMIT
                elif any(_has(one.rolled_back, life) for one in self.banks.values()):
                    found = ABORT
                else:
                    continue
                self.trace.add("by hand at {}: {} {}", bank.name, life, found.name)
                self.by_hand.add((life.saga_id, life.round))
                self.seen[f"by hand: {found.name}"] += 1
                bank.settle(life, found)

    # -- questions -------------------------------------------------------------------------------

    async def _banks_ask(self) -> None:
        """Each about all that it holds, again and again."""
        while True:
            await anyio.sleep(self.chance.choice(ASK_EVERY_S))
            for bank in self.banks.values():
                for life in [*bank.held]:
                    if self._engine is not None and self._tasks is not None:
                        self._tasks.start_soon(self._ask, self._engine, bank, life)

    async def _ask(self, engine: Engine, bank: Bank, life: Life) -> None:
        vote = bank.held.get(life)
        if vote is None:
            return
        told = await self._find(engine, life.saga_id, life.round, vote.incarnation)
        if told in (COMMIT, ABORT) and life in bank.held:
            if told is ABORT:
                self.presumed.add((life.saga_id, life.round))
            self.seen["told what it held"] += 1
            bank.settle(life, told)

    async def _ask_by_hand(self, engine: Engine, saga_id: str) -> None:
        """A person asks about the first round in the name of the incarnation that is here."""
        if (
            saga_id not in self.has_lost
            or saga_id not in self.disk.saga_nos
            or self._is_held_back(saga_id)
        ):
            await self._find(engine, saga_id, 1, self.disk.incarnation)

    async def _find(
        self, engine: Engine, saga_id: str, round_: int, incarnation: str
    ) -> CommitDecision | None:
        """What the runtime says; rules 2 and 3 are about it."""
        assert isinstance(engine.store, MemoryStore)
        decisions = Decisions(engine.supervisor, engine.store, engine.store.identity)
        store_id, was = self.disk.store_id, self._known(saga_id, round_, incarnation)
        told = await self._quietly(
            lambda: decisions.find(saga_id, round_, store_id=store_id, incarnation=incarnation)
        )
        if told is None:
            return None
        still = self._known(saga_id, round_, incarnation)
        self.trace.add("told of {} in round {}: {}", saga_id, round_, told.name)
        self.seen[f"told {told.name}"] += 1
        if self.disk.restored:
            self.seen[f"told {told.name} before the confirmation"] += 1
            if told in (COMMIT, ABORT) and self.decided[saga_id, round_] - {told}:
                self.breaks("nobody is told otherwise than was decided", f"{saga_id}: {told.name}")
        if told not in (was, still):
            self.breaks(
                "who asks is told what the store may say",
                f"{saga_id}, round {round_}: {told.name}, and it was {was.name}, {still.name}",
            )
        return told

    def _known(self, saga_id: str, round_: int, incarnation: str) -> CommitDecision:
        """What is to be told at this moment, by the disk alone."""
        disk, is_own = self.disk, incarnation == self.disk.incarnation
        if not is_own and (disk.restored or incarnation not in disk.earlier_incarnations):
            return UNKNOWN
        if saga_id not in disk.saga_nos:
            return UNKNOWN if disk.restored else ABORT
        if self._is_held_back(saga_id) or (not is_own and self._was_started_again(saga_id)):
            return UNKNOWN
        return decision_of(self._saga(disk.saga_nos[saga_id]), round_)

    def _was_started_again(self, saga_id: str) -> bool:
        """It was lost as a whole, and then somebody used its id once more."""
        is_lost = saga_id in self.has_lost
        return is_lost and self.disk.saga_nos[saga_id] > self.disk.restored_through_no

    def _saga(self, saga_no: int) -> Saga:
        """As it is on the disk."""
        loaded = self.disk.history[saga_no]
        definition = self.disk.definitions[self.disk.sagas[saga_no].definition_hash].definition
        saga = fold(Plan(definition), (record for turn in loaded for record in turn.records))
        assert saga is not None, "a stored saga has at least its start"
        return saga

    # -- while it goes on ------------------------------------------------------------------------

    def check_call(self, call: Call) -> None:
        """Rule 1: nobody is called for what is held back."""
        if self._is_held_back(call.saga_id):
            self.breaks(
                "nobody is called for what is held back", f"{call.verb.name} {call.saga_id}"
            )

    def check_carried_out(self, bank: Bank, life: Life, call: BankCall) -> None:
        """Rule 5: somebody has decided it."""
        key = life.saga_id, life.round
        decided = self.decided[key]
        wanted = COMMIT if call.verb is Verb.EXECUTE else ABORT
        if wanted in decided or key in self.by_hand or (wanted is ABORT and key in self.presumed):
            return
        self.breaks("what is carried out was decided", f"{bank.name}: {life} {wanted.name}")

    # -- the end ---------------------------------------------------------------------------------

    async def _come_right(self) -> None:
        """No more trouble; new transfers end, the store is confirmed, everything ends."""
        await anyio.sleep(ARRIVES_S)
        self._trouble = self.reads_fail = 0.0
        self.disk.take_fault()
        async with self._a_runtime() as (engine, _):
            self.trace.add("calm")
            await anyio.sleep(CALM_S)
            if self.disk.restored:
                self._check_unconfirmed(await engine.supervisor.survey())
                await self._confirm(engine.supervisor)
                await anyio.sleep(CALM_S)
            survey = await engine.supervisor.survey()
            if any(survey.active.values()) or survey.without_wake_up or survey.branches_in_doubt:
                self.breaks("every saga ends", f"{survey}")
            self._audit()

    def _check_unconfirmed(self, survey: Survey) -> None:
        """Rule 4: only what is held back has not ended; and it is seen, and nothing wakes it."""
        held_back = sum(not row.ended_at_ms for row in self.disk.sagas.values())
        if survey.without_wake_up or sum(survey.active.values()) != held_back:
            self.breaks("what is held back is counted", f"{held_back}: {survey}")
        for row in self.disk.sagas.values():
            if not row.ended_at_ms:
                self.seen["held back to the end"] += 1
                if not self._is_held_back(row.saga_id):
                    self.breaks("new transfers end before the confirmation", row.saga_id)

    def _audit(self) -> None:
        """Rules 6, 7 and 8."""
        for bank in self.banks.values():
            for life, vote in bank.held.items():
                if self._known(life.saga_id, life.round, vote.incarnation) is not UNKNOWN:
                    self.breaks("nothing is held at the end", f"{bank.name}: {life}")
                self.seen["orphan"] += 1
        for saga_id, definition in self._flows.items():
            saga_no = self.disk.saga_nos.get(saga_id)
            state = None if saga_no is None else self.disk.sagas[saga_no].state
            self.seen["lost for ever" if state is None else state.name] += 1
            for what in self._differs(saga_id, definition, saga_no):
                self.breaks("it ended as it says", f"{saga_id} is {state}: {what}")

    def _differs(self, saga_id: str, definition: Definition, saga_no: int | None) -> list[str]:
        committed = [
            life for bank in self.banks.values() for life in bank.committed if life[0] == saga_id
        ]
        by_step = Counter(life.step for life in committed)
        rounds = {life.round for life in committed}
        names = {step.name for step in definition.steps}
        is_all = by_step == dict.fromkeys(names, 1) and len(rounds) == 1
        if saga_no is None:
            return [] if is_all or not committed else [f"committed are {committed}"]
        saga = self._saga(saga_no)
        if saga.end is SagaState.COMPLETED:
            return [] if is_all else [f"committed are {committed}"]
        if saga.end is SagaState.COMPENSATED:
            if committed and self._was_started_again(saga_id):
                self.seen["committed before its id was used again"] += 1
                return []
            return [f"committed are {committed}"] if committed else []
        if saga.end is not SagaState.MIXED or saga_id not in self.has_lost:
            return ["which it cannot be"]
        is_as_decided = is_all if saga.decision is COMMIT else not committed
        return ["but all is as decided"] if is_as_decided else []


def _has(lives: set[Life], life: Life) -> bool:
    return any((one.saga_id, one.round) == (life.saga_id, life.round) for one in lives)
