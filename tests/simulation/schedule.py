"""A schedule: everything that is decided before the world begins, as a value.

It is drawn from a seed, or made by hand by a test. What happens *while* it runs is the business of
`faults.Faults`, whose chance is drawn last, so that a schedule from which something was taken out
meets the same dice.
"""

from __future__ import annotations

import random
from collections.abc import Collection

import msgspec

from amends_runtime.actors.supervisor import Limits
from amends_runtime.core.breaker import BreakerPolicy
from amends_runtime.core.definition import Plan
from tests.simulation.faults import INCIDENTS, VOTE_RATES, Fault, Faults, draw_weather
from tests.simulation.flows import PARTICIPANTS, RIVALS, commits, flows

__all__ = ["Incident", "SagaScript", "Schedule", "draw"]


class SagaScript(msgspec.Struct, frozen=True, kw_only=True):
    """What a client does with one saga. Instants are seconds of virtual time.

    patient         it asks until its start is answered; otherwise it asks once
    cancel_at_s     when it cancels; None: never
    repeat_at_s     when somebody repeats its start
    other_at_s      when somebody starts the same id with other content
    looks_at_s      when it looks at the saga
    waits           it waits for the end once the start is acknowledged
    retry_at_s      when an operator tries what is stuck again
    abandon_at_s    when an operator abandons it, `by_force` even if it is not stuck
    """

    saga_id: str
    plan: Plan
    start_at_s: float = 0.0
    deadline_ms: int = 0
    patient: bool = True
    cancel_at_s: float | None = None
    repeat_at_s: float | None = None
    other_at_s: float | None = None
    looks_at_s: tuple[float, ...] = ()
    waits: bool = False
    retry_at_s: float | None = None
    abandon_at_s: float | None = None
    by_force: bool = False

    def __str__(self) -> str:
        """The saga and what is done with it, as a trace begins with it."""
        steps = "; ".join(
            f"{step.name} {step.kind.name} at {step.participant} after"
            f" {', '.join(step.after or ()) or 'nothing'}, {step.timeout_ms} ms"
            for step in self.plan.steps
        )
        plan = {
            name: getattr(self, name)
            for name in self.__struct_fields__
            if name not in ("saga_id", "plan") and getattr(self, name) not in (None, ())
        }
        said = ", ".join(f"{name}={value}" for name, value in plan.items())
        return f"saga {self.saga_id}, {self.plan.definition.name} [{steps}]: {said}"


BREAKER = BreakerPolicy(failures_to_open=3, open_ms=200, max_open_ms=2_000)
"""Opens soon, and probes often: most schedules last for seconds."""

PATIENT_BREAKER = BreakerPolicy(failures_to_open=3)
"""Probes as seldom as in life: hours of an outage are some hundred probes."""


class Incident(msgspec.Struct, frozen=True):
    """A fault that is planned for an instant. `lasts_s` for those that last."""

    at_s: float
    fault: Fault
    target: str = ""
    lasts_s: float = 0.0


class Schedule(msgspec.Struct, frozen=True):
    """Sagas and incidents, and when the faults stop.

    everything_again    all that was ever sent arrives once more at the end
    abandons            the operator abandons what is stuck in the calm, instead of retrying it
    limits              the runtime's, with which it was configured
    page                how much it takes at once where it goes in pages and slices; None: as in
                        life, where a page is more than a schedule has
    breaker             of every participant
    by_hand             participants that the configuration does not have: an operator registered
                        them, and they are gone when one removes them
    streams             participants that are called over streams; the others by the unary verbs
    horizon_ms          how far ahead timers are kept of sagas that are parked; None: as in life
    stream_again_s      after so long a stream is tried again that was refused
    is_outage           nothing goes wrong but that one participant is down for very long
    """

    sagas: tuple[SagaScript, ...]
    incidents: tuple[Incident, ...] = ()
    calm_at_s: float = 1.0
    everything_again: bool = True
    abandons: bool = False
    limits: Limits = Limits()
    page: int | None = None
    breaker: BreakerPolicy = BREAKER
    by_hand: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    horizon_ms: int | None = None
    stream_again_s: float = 300.0
    is_outage: bool = False

    def without(self, sagas: Collection[int], incidents: Collection[int]) -> Schedule:
        """The schedule without some of its sagas and incidents, by number."""
        return msgspec.structs.replace(
            self,
            sagas=tuple(saga for n, saga in enumerate(self.sagas) if n not in sagas),
            incidents=tuple(one for n, one in enumerate(self.incidents) if n not in incidents),
        )


def draw(seed: int, off: Collection[Fault] = ()) -> tuple[Schedule, Faults]:
    """Draw a schedule, and its faults without those that are `off`, from a seed."""
    chance = random.Random(seed)  # noqa: S311  # to be repeated, not to be secret
    calm_at_s = chance.choice((0.1, 0.3, 0.3, 1.0, 1.0, 1.0, 3.0, 3.0, 10.0))
    count = chance.choice((1, 1, 1, 2, 2, 3, 4, 6))
    sagas = [_saga(f"s{number}", calm_at_s, chance) for number in range(count)]
    # Chance of their own, so that without them a seed means what it meant.
    votes = random.Random(f"votes {seed}")  # noqa: S311  # to be repeated
    sagas = _with_commits(sagas, votes)
    incidents = []
    for fault in INCIDENTS:
        # Drawn in any case, so that every kind has its own place in the stream.
        times, gate = chance.choice((1, 1, 2, 3)), chance.random()
        planned = [_incident(fault, calm_at_s, chance) for _ in range(times)]
        if gate < INCIDENT_CHANCE:
            incidents += planned
    incidents.sort(key=lambda incident: incident.at_s)
    schedule = Schedule(
        sagas=tuple(sagas),
        incidents=tuple(incidents),
        calm_at_s=calm_at_s,
        everything_again=chance.random() < 0.5,
        abandons=chance.random() < 0.2,
        limits=Limits(
            commit_batch=chance.choice((1, 2, 512, 512)),
            live_sagas=chance.choice((1, 2, 100, 100, 100, 100)),
            park_after_ms=chance.choice(PARK_AFTER_MS),
        ),
        horizon_ms=chance.choice((400, 4_000, None)),
        page=chance.choice((1, 2, None)),
        by_hand=tuple(name for name in PARTICIPANTS if chance.random() < 0.5),
        streams=chance.choice(STREAMS),
        stream_again_s=chance.choice((0.1, 1.0, 300.0)),
    )
    weather = draw_weather(chance) | draw_weather(votes, VOTE_RATES)
    if chance.random() < OUTAGE_CHANCE:
        schedule, weather = _outage(schedule, chance), {Fault.IN_PROGRESS: 0.2}
    dice = random.Random(chance.getrandbits(64))  # noqa: S311  # to be repeated
    return schedule, Faults(dice, weather, off)


STREAMS = ((), (), (), PARTICIPANTS, PARTICIPANTS, PARTICIPANTS[:1])
"""Who is called over streams: in half of the schedules somebody, in most of those everybody."""

PARK_AFTER_MS = (1, 10, 100, 10_000, 10_000, 10_000)
"""How far away the wake-up of a saga is that is parked: in half of the schedules hardly at all."""

INCIDENT_CHANCE = 0.15
"""How probable it is that a schedule has incidents of one kind."""

OUTAGE_CHANCE = 0.008
"""How probable it is that a schedule is one long outage."""

OUTAGE_S = (700.0, 2_000.0, 7_000.0)


def _outage(schedule: Schedule, chance: random.Random) -> Schedule:
    """A participant is down for longer than any retry lasts, and all else is as it should be."""
    at_s, lasts_s = chance.choice((0.0, 0.05, 0.3)), chance.choice(OUTAGE_S)
    name = chance.choice(schedule.sagas[0].plan.steps).participant
    sagas = tuple(
        msgspec.structs.replace(saga, start_at_s=chance.random() * chance.choice((1.0, lasts_s)))
        for saga in schedule.sagas[:3]
    )
    return msgspec.structs.replace(
        schedule,
        sagas=sagas,
        incidents=(Incident(at_s, Fault.PARTICIPANT_DOWN, name, lasts_s),),
        calm_at_s=at_s + lasts_s + 1.0,
        limits=Limits(),  # who finds no place would ask for hours
        horizon_ms=None,
        breaker=PATIENT_BREAKER,
        is_outage=True,
    )


def _saga(saga_id: str, calm_at_s: float, chance: random.Random) -> SagaScript:
    start_at_s = chance.random() * calm_at_s * 0.7

    def soon() -> float:
        return start_at_s + chance.random() * chance.choice((0.05, 0.3, calm_at_s))

    plans = flows()
    plan = plans[chance.randrange(9)] if chance.random() < 0.3 else chance.choice(plans)
    cancel_at_s, repeat_at_s, other_at_s = soon(), soon(), soon()
    looks = tuple(sorted(soon() for _ in range(2)))
    cancels, repeats, others = chance.random(), chance.random(), chance.random()
    retry_at_s, abandon_at_s = soon(), soon()
    retries, abandons = chance.random(), chance.random()
    return SagaScript(
        saga_id=saga_id,
        plan=plan,
        start_at_s=start_at_s,
        deadline_ms=chance.choice((0, 0, 0, 0, 0, 30, 200, 1_000, 20_000)),
        patient=chance.random() < 0.85,
        cancel_at_s=cancel_at_s if cancels < 0.2 else None,
        repeat_at_s=repeat_at_s if repeats < 0.15 else None,
        other_at_s=other_at_s if others < 0.08 else None,
        looks_at_s=looks[: chance.choice((0, 0, 1, 2))],
        waits=chance.random() < 0.3,
        retry_at_s=retry_at_s if retries < 0.15 else None,
        abandon_at_s=abandon_at_s if abandons < 0.06 else None,
        by_force=chance.random() < 0.7,
    )


def _with_commits(sagas: list[SagaScript], chance: random.Random) -> list[SagaScript]:
    """Some of the sagas are two-phase commits, and sometimes they want the same at once."""
    share = chance.choice(COMMIT_SHARES)
    rivals, rush_s = chance.random() < RIVALRY, chance.choice((0.0, 0.005, 0.05))
    mixed = []
    for saga in sagas:
        is_commit = chance.random() < share
        rival, other = commits()[chance.randrange(RIVALS)], chance.choice(commits())
        start_at_s = chance.random() * rush_s
        if is_commit and rivals:
            mixed.append(msgspec.structs.replace(saga, plan=rival, start_at_s=start_at_s))
        elif is_commit:
            mixed.append(msgspec.structs.replace(saga, plan=other))
        else:
            mixed.append(saga)
    return mixed


COMMIT_SHARES = (0.0, 0.0, 0.3, 0.6, 1.0)
"""How many of a schedule's sagas are two-phase commits."""

RIVALRY = 0.5
"""In how many schedules those are rivals for the same accounts, and start together."""


def _incident(fault: Fault, calm_at_s: float, chance: random.Random) -> Incident:
    at_s = chance.random() * calm_at_s
    target = chance.choice(("alpha", "beta", "gamma"))
    lasts_s = chance.choice((0.05, 0.3, 1.0)) * (0.5 + chance.random())
    if fault in (Fault.CLOCK_FORWARD, Fault.CLOCK_BACK):
        lasts_s = chance.choice((0.05, 1.0, 30.0))  # how far the clock is set
    return Incident(at_s, fault, target, lasts_s)
