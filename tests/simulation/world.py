"""The world of one schedule: everything in it, and its course.

    storm     sagas start, faults strike, incidents happen
    calm      nothing goes wrong any more; everybody who has not ended gets the time to
    audit     `rules.py` looks at the ledgers, the journals, and the disk

One event loop, one source of chance, no clock but the loop's: the same schedule and the same dice
take the same course.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import msgspec

from amends_runtime.core.records import CommitDecision, SagaState, Verb
from amends_runtime.core.saga import Phase
from amends_runtime.dispatch.lanes import Lane, _Entry
from amends_runtime.ports import ParticipantAddress, RegisteredDefinition
from amends_runtime.storage.memory import MemoryDisk
from amends_runtime.testing.virtual_time import START_MS, Stalled
from tests.simulation import rules
from tests.simulation.client import Client
from tests.simulation.faults import Fault, Faults
from tests.simulation.flows import PARTICIPANTS
from tests.simulation.loop import Livelock, SimulatedLoop
from tests.simulation.network import Network, configured
from tests.simulation.operators import Operators
from tests.simulation.participants import Effect, Participant
from tests.simulation.runtime import Deployment, Process, constants_of
from tests.simulation.schedule import Incident, Schedule
from tests.simulation.trace import Trace, logs_into

__all__ = ["Course", "Facts", "Violation", "World", "run"]

CALM_S = 400.0  # the longest backoffs, deadlines and breakers, one after the other
OPERATOR_ROUNDS = 4  # a saga may go from one stuck step to the next
LOOK_S = 0.25  # how often it is asked whether all is over, and whether anybody was forgotten
MOST_LOOKS = 100  # in a storm of hours
LONG_OUTAGE_S = 600.0
GONE_S = (1.0, 3.0)  # how long a participant is away that goes at work
STOPPED_S = (0.02, 0.9)  # until its saga is stopped; it would have been asked again in 0.5 s
POLL_GRACE_S = 1.0  # after an attempt's deadline, until a poll of it that cannot be sent is over


class Violation(msgspec.Struct, frozen=True):
    """Something that must not be: the rule in words, and what broke it."""

    rule: str
    what: str


class Facts(msgspec.Struct):
    """What the world did to steps, by saga and step: the excuses for what is stuck."""

    rejected: set[tuple[str, str]] = msgspec.field(default_factory=set)
    broken: set[tuple[str, str]] = msgspec.field(default_factory=set)
    misread: set[tuple[str, str]] = msgspec.field(default_factory=set)
    refusals: dict[tuple[str, str, int], set[str]] = msgspec.field(default_factory=dict)
    """With what reasons, by saga, step and round."""
    broken_votes: set[tuple[str, str]] = msgspec.field(default_factory=set)
    told: dict[tuple[str, int], CommitDecision] = msgspec.field(default_factory=dict)
    """What participants in doubt were told, by saga and round."""
    misconfigured: dict[tuple[str, str], float] = msgspec.field(default_factory=dict)
    """Until when, in seconds of virtual time."""
    probes: set[tuple[str, int, Verb, int, int]] = msgspec.field(default_factory=set)
    """Attempts whose last call was a breaker's probe, and found nobody; round and attempt last."""


class Course(msgspec.Struct, frozen=True):
    """What came of a schedule."""

    violations: tuple[Violation, ...]
    fired: dict[Fault, int]
    ends: dict[str, int]
    operations: dict[str, int]
    trace: Trace


class World:
    """Everything there is."""

    def __init__(self, schedule: Schedule, faults: Faults, loop: SimulatedLoop) -> None:
        self.schedule = schedule
        self.faults = faults
        self.loop = loop
        self.context = contextvars.copy_context()
        self.trace = Trace(loop.time)
        self.violations: list[Violation] = []
        self.facts = Facts()
        self.ledger: list[Effect] = []
        self.commits = 0
        self.is_over = False
        self.disk = _disk(schedule)
        self.plans = {script.plan.content_hash: script.plan for script in schedule.sagas}
        self.participants = {name: Participant(self, name) for name in PARTICIPANTS}
        self.network = Network(self)
        self.deployment = Deployment(self)
        self.operators = Operators(self)
        self.clients = [Client(self, script) for script in schedule.sagas]
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._planned = 0  # things that clients have yet to begin
        # Polls of sagas that turned back, and since when they were seen to wait.
        self._stopped_polls: dict[int, tuple[object, float]] = {}
        faults.tell = lambda fault, where: self.trace.add("! {} ({})", fault.value, where)

    # -- for everybody in it ---------------------------------------------------------------------

    def now_s(self) -> float:
        """Seconds since the beginning."""
        return self.loop.time()

    def later(self, delay_s: float, callback: Callable[..., object], *arguments: Any) -> None:
        """Let something happen, whatever becomes of whoever asked for it."""
        self.loop.call_later(delay_s, callback, *arguments, context=self.context)

    def at(self, at_s: float, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a task at an instant. The schedule is not over before it has ended."""
        self._planned += 1
        self.later(max(0.0, at_s - self.now_s()), self._begin, function)

    def _begin(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._planned -= 1
        task = self.loop.create_task(function(), context=self.context)
        self._tasks[task] = None
        task.add_done_callback(self._ended, context=self.context)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.violation(
                "a client is told one of the errors that the API knows",
                f"{type(error).__name__}: {error}",
            )

    def raised(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Something raised where nobody could catch it."""
        error = context.get("exception")
        self.violation(
            "nothing raises into the event loop",
            f"{context['message']}: {type(error).__name__}: {error}",
        )

    def violation(self, rule: str, what: str) -> None:
        """A rule does not hold."""
        self.violations.append(Violation(rule, what))
        self.trace.add("VIOLATION {}: {}", rule, what)

    def wrote(self, process: Process, what: object) -> None:
        """This is on the disk, whoever learns of it."""
        self.commits += 1
        self.trace.add("{} wrote {}", process.name, what)

    def configured(self) -> list[ParticipantAddress]:
        """The participants of the configuration."""
        return [configured(name) for name in self.participants if name not in self.schedule.by_hand]

    def polls_wait(self, saga_id: str) -> bool:
        """Whether a call of a saga's that was sent already waits in a lane to be sent again."""
        current = self.deployment.current
        if current is None:
            return False
        entries = [e for lane in current.engine.lanes._lanes.values() for e in _waiting_polls(lane)]
        return any(entry.call.saga_id == saga_id for entry in entries)

    def ledger_of(self, saga_id: str, step: str) -> list[Effect]:
        """The effects and fences of one step."""
        return [e for e in self.ledger if e.saga_id == saga_id and e.step == step]

    # -- its course ------------------------------------------------------------------------------

    async def live(self) -> None:
        """Storm, calm, audit."""
        await self._storm()
        self._calm_down()
        await self._wait_until_over()
        await self._settle_stuck()
        if not self.violations:
            await rules.audit(self)
            if self.schedule.everything_again:
                self._everything_again()

    async def _storm(self) -> None:
        for script in self.schedule.sagas:
            self.trace.add("{}", script)
        self.deployment.start()
        for client in self.clients:
            client.begin()
        for incident in self.schedule.incidents:
            self.later(incident.at_s, self._happen, incident)
        look_s = max(LOOK_S, self.schedule.calm_at_s / MOST_LOOKS)
        while self.now_s() < self.schedule.calm_at_s:
            await anyio.sleep(min(look_s, self.schedule.calm_at_s - self.now_s()) + 0.0001)
            self._look()

    def _calm_down(self) -> None:
        self.trace.add("calm")
        self.faults.is_calm = True
        for participant in self.participants.values():
            participant.is_down = False
            for stream in participant.streams:
                stream.open()
        self.at(0.0, self.operators.bring_back)
        for process in self.deployment.living():
            process.resume()

    async def _settle_stuck(self) -> None:
        """The faults are gone; an operator takes care of what they left behind."""
        for _ in range(OPERATOR_ROUNDS):
            stuck = self._stuck()
            if self.violations or not stuck:
                return
            rules.check_stuck(self)
            for client in stuck:
                client.reconnect()
                self.at(0.0, client.abandon if self.schedule.abandons else client.retry)
            await self._wait_until_over()
        if not self.violations and self._stuck():
            self.violation(
                "an operator's retry, after the fault is gone, ends a stuck saga",
                self._who_has_not_ended(),
            )

    def _stuck(self) -> list[Client]:
        """Those whose sagas are stuck."""
        stuck = {row.saga_id for row in self.disk.sagas.values() if not row.ended_at_ms}
        return [client for client in self.clients if client.journal.script.saga_id in stuck]

    async def _wait_until_over(self) -> None:
        give_up_at_s = self.now_s() + CALM_S
        while not self._is_quiet():
            await anyio.sleep(LOOK_S)
            self._look()
            if self.violations:
                return
            if self.now_s() > give_up_at_s:
                self._too_late()
                return

    def _is_quiet(self) -> bool:
        current = self.deployment.current
        if current is None or not current.is_serving:
            return False
        if self._planned or self._tasks or self.network.under_way:
            return False
        counts = current.supervisor.counts()
        if counts.backlog or counts.arriving or self._unanswered():
            return False
        return all(_is_at_rest(self, saga_no) for saga_no in self.disk.sagas)

    def _unanswered(self) -> int:
        """Requests that living runtimes have taken in and not answered yet."""
        return sum(process.unanswered for process in self.deployment.living())

    def _too_late(self) -> None:
        """It has been calm for long enough, and something is still open."""
        if all(_is_at_rest(self, saga_no) for saga_no in self.disk.sagas) and self._unanswered():
            self.violation(
                "a runtime that lives answers every request", f"{self._unanswered()} are open"
            )
        else:
            self.violation("every saga ends, or is stuck and says so", self._who_has_not_ended())

    def _who_has_not_ended(self) -> str:
        rows = [
            f"{row.saga_id} is {row.state.name}"
            for row in self.disk.sagas.values()
            if not row.ended_at_ms
        ]
        return ", ".join(rows) or f"clients: {self._planned + len(self._tasks)} still wait"

    def _look(self) -> None:
        """Whether anybody was forgotten."""
        for process in self.deployment.living():
            if process.is_serving and not process.is_paused:
                counts = process.supervisor.counts()
                if counts.parked:
                    self.faults.count(Fault.PARKED, process.name)
                if counts.without_wake_up:
                    self.violation(
                        "a saga that has not ended has something that wakes it",
                        f"{process.name}: {counts}",
                    )
                self._look_at_store(process)
                for lane in process.engine.lanes._lanes.values():
                    self._look_at_lane(process, lane)

    def _look_at_store(self, process: Process) -> None:
        lost_at_s = process.store.lost_at_s
        if lost_at_s is not None and lost_at_s + LOOK_S < self.now_s():
            self.violation(
                "a runtime whose store could not be reopened ends",
                f"{process.name} lives since {lost_at_s:.3f}",
            )

    def _look_at_lane(self, process: Process, lane: Lane) -> None:
        """What waits there is still wanted."""
        for entry in lane._entries.values():
            saga_no = self.disk.saga_nos[entry.call.saga_id]
            is_over = self.disk.sagas[saga_no].ended_at_ms > 0
            if is_over and process.store.knows(saga_no, len(self.disk.history[saga_no])):
                self.violation(
                    "a lane holds no call of a saga that has ended",
                    f"{process.name}: {entry.call.saga_id} {entry.call.step_name}",
                )
        for entry in _waiting_polls(lane):
            call = entry.call
            actor = process.supervisor._actors.get(call.saga_id)
            saga = actor.saga if actor is not None else None
            if saga is None or saga.phase is not Phase.BACKWARD or call.verb is Verb.COMPENSATE:
                continue
            if process is not self.deployment.current:
                continue  # it is told nothing of a participant that comes back
            since_s = self._stopped_polls.setdefault(id(entry), (entry, self.now_s()))[1]
            if since_s == self.now_s():
                self.faults.count(Fault.POLL_WAITS, call.saga_id)
            limit_s = call.timeout_ms / 1000 + POLL_GRACE_S
            if self.faults.fired[Fault.PAUSE] or self.faults.fired[Fault.CLOCK_BACK]:
                continue  # its deadline is by the wall clock, and its timer was held
            if since_s + limit_s < self.now_s():
                self.violation(
                    "a poll that cannot be sent holds up no compensation beyond its deadline",
                    f"{call.saga_id}: {call.step_name} waits since {since_s:.3f}",
                )

    def _everything_again(self) -> None:
        """Copies of all that was ever sent arrive once more: nothing comes of them."""
        ended = {
            row.saga_id
            for row in self.disk.sagas.values()
            if row.state in (SagaState.COMPLETED, SagaState.COMPENSATED)
        }
        before = len(self.ledger)
        for participant, message in self.network.sent:
            if message.saga_id in ended:
                participant.deliver_again(message)
        for effect in self.ledger[before:]:
            self.violation(
                "a copy of an old call has no effect",
                f"{effect.saga_id}: {effect.step} {effect.verb}, after the saga's end",
            )

    # -- incidents -------------------------------------------------------------------------------

    def _happen(self, incident: Incident) -> None:
        if self.faults.is_calm or incident.fault in self.faults.off:
            return
        fault, current = incident.fault, self.deployment.current
        if fault is Fault.PARTICIPANT_CRASH:
            self._count(incident)
            self.participants[incident.target].crash()
        elif fault is Fault.PARTICIPANT_DOWN:
            self._count(incident)
            self.participants[incident.target].crash()
            self.participants[incident.target].is_down = True
            if incident.lasts_s > LONG_OUTAGE_S:
                self.faults.count(Fault.LONG_OUTAGE, incident.target)
            self.later(incident.lasts_s, self._up_again, incident.target)
            if self.faults.pick((True, False)) and not self.schedule.is_outage:
                moved = Incident(0.0, Fault.MOVE, incident.target)
                self.later(incident.lasts_s / 2, self._happen, moved)
        elif fault in (Fault.CLOCK_FORWARD, Fault.CLOCK_BACK):
            self._count(incident)
            sign = 1 if fault is Fault.CLOCK_FORWARD else -1
            clock = self.faults.pick(self.deployment.clocks)
            clock.jump(sign * round(incident.lasts_s * 1000))
        elif current is None or current.is_paused:
            return
        elif fault is Fault.MOVE:
            self._count(incident)
            self.operators.move(current, incident.target)
        elif fault is Fault.REMOVE:
            if incident.target in self.schedule.by_hand:
                self._count(incident)
                _ = self.operators.remove(current, incident.target)
                self.later(incident.lasts_s, self._put_back, incident.target)
        elif fault is Fault.REGISTER:
            self._count(incident)
            self.operators.register(current)
        else:
            self._strike(incident, current)

    def _strike(self, incident: Incident, process: Process) -> None:
        """What happens to the runtime."""
        if incident.fault is Fault.CRASH_ANYWHERE:
            self._count(incident)
            process.die()
            return
        if incident.fault is not Fault.TAKEOVER_ALIVE:
            self.faults.count(Fault.PAUSE, process.name)
            process.pause()
            self.later(incident.lasts_s, process.resume)
        if incident.fault is not Fault.PAUSE:
            early = 0.0 if incident.fault is Fault.TAKEOVER_ALIVE else incident.lasts_s / 2
            self.later(early, self._take_over, incident, process)

    def _take_over(self, incident: Incident, process: Process) -> None:
        """Somebody takes a process for dead, and starts another one on its store."""
        if process is self.deployment.current and not self.faults.is_calm:
            self._count(incident)
            self.deployment.start(elsewhere=True)

    def _up_again(self, name: str) -> None:
        self.participants[name].is_down = False

    def goes_at_work(self, name: str, saga_id: str) -> None:
        """A participant goes in the middle of slow work, and somebody stops its saga meanwhile."""
        lasts_s = self.faults.between(*GONE_S)
        stop_at_s = self.now_s() + self.faults.between(*STOPPED_S)
        client = next(c for c in self.clients if c.journal.script.saga_id == saga_id)
        abandons = self.faults.pick((True, False))
        self.at(stop_at_s, client.abandon_by_force if abandons else client.cancel)
        current = self.deployment.current
        if name not in self.schedule.by_hand:
            self.later(0.0, self._happen, Incident(0.0, Fault.PARTICIPANT_DOWN, name, lasts_s))
        elif current is not None and not current.is_paused:
            _ = self.operators.remove(current, name)
            self.operators.away_until_s = self.now_s() + lasts_s
            self.later(lasts_s, self._put_back, name)

    def _put_back(self, name: str) -> None:
        current = self.deployment.current
        if current is not None and name not in self.disk.participants:
            _ = self.operators.put(current, name)

    def _count(self, incident: Incident) -> None:
        self.faults.count(incident.fault, incident.target)

    # -- the end ---------------------------------------------------------------------------------

    async def end(self) -> None:
        """Nothing of it goes on."""
        self.is_over = True
        for process in self.deployment.living():
            process.die()
        for task in list(self._tasks):
            task.cancel()
        while self._tasks:  # noqa: ASYNC110  # a few rounds of the loop
            await asyncio.sleep(0)
        for process in self.deployment.processes:
            await process.bury()


def run(schedule: Schedule, faults: Faults) -> Course:
    """Run one schedule to its end and give its course. Raises nothing for what goes wrong in it."""
    loop = SimulatedLoop()
    asyncio.set_event_loop(loop)
    try:
        world = World(schedule, faults, loop)
        loop.set_exception_handler(world.raised)
        with (
            logs_into(world.trace, lambda what: world.violation("deciding never crashes", what)),
            constants_of(schedule),
        ):
            try:
                loop.run_until_complete(world.live())
            except (Stalled, Livelock) as error:
                world.violation("nothing hangs", str(error))
            virtual_s = loop.time()
            loop.run_until_complete(world.end())
        return _course(world, virtual_s)
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _course(world: World, virtual_s: float) -> Course:
    ends: dict[str, int] = {}
    for row in world.disk.sagas.values():
        ends[row.state.name] = ends.get(row.state.name, 0) + 1
    journals = [client.journal for client in world.clients]
    return Course(
        violations=tuple(world.violations),
        fired=dict(world.faults.fired),
        ends=ends,
        operations={
            "callbacks": world.loop.steps,
            "commits": world.commits,
            "two-phase commits": sum(
                world.plans[row.definition_hash].two_phase is not None
                for row in world.disk.sagas.values()
            ),
            "calls": len(world.network.sent),
            "effects": sum(not effect.is_fence for effect in world.ledger),
            "fences": sum(effect.is_fence for effect in world.ledger),
            "runtimes": len(world.deployment.processes),
            "starts acknowledged": sum(journal.acknowledged for journal in journals),
            "answers to cancellations and operators": sum(
                len(journal.answers) for journal in journals
            ),
            "views checked": sum(len(journal.views) for journal in journals),
            "virtual seconds": round(virtual_s),
        },
        trace=world.trace,
    )


def _disk(schedule: Schedule) -> MemoryDisk:
    """A disk on which the definitions are registered already, as by an earlier life."""
    disk = MemoryDisk()
    disk.store_id, disk.incarnation = "store", "incarnation"  # else every run had other ones
    for number, script in enumerate(schedule.sagas, 1):
        plan = script.plan
        disk.definitions.setdefault(
            plan.content_hash,
            RegisteredDefinition(plan.definition, plan.content_hash, 1, START_MS, number),
        )
    for name in schedule.by_hand:
        held = msgspec.structs.replace(configured(name), by_operator=True)
        disk.participants[name] = held
    return disk


def _waiting_polls(lane: Lane) -> list[_Entry]:
    """Calls that were sent, were in progress, and wait to be asked again but for their lane."""
    return [entry for entry in lane._entries.values() if entry.queued and entry.sent_at_ms]


def _is_at_rest(world: World, saga_no: int) -> bool:
    """Whether a saga has ended, or is stuck for good: a deadline ahead would still turn it back."""
    row = world.disk.sagas[saga_no]
    if row.ended_at_ms:
        return True
    if row.state is not SagaState.STUCK or world.plans[row.definition_hash].two_phase is not None:
        return False  # what a two-phase commit has decided it goes on telling
    return not rules.deadline_is_ahead(rules.state_of(world, saga_no))
