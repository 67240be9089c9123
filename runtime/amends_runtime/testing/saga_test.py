"""`SagaTest`: a runtime, its participants and time itself, in the hands of a test.

The engine is the real one, over a store in memory and a clock that never waits. What it calls is
scripted. Everything is synchronous for the test: nothing happens between its lines, and what a line
asks for has happened when it returns.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Self

import amends
from amends.arguments import checked_labels, checked_seconds, checked_text
from amends.definition_checks import nearest
from amends.definition_problems import DefinitionProblem
from amends.payload import EMPTY, encode, to_wire
from amends.saga_wire import breaker_from_wire
from amends_runtime import wire
from amends_runtime.actors.supervisor import StartRequest
from amends_runtime.api.validation import Checks
from amends_runtime.core.breaker import BreakerPolicy
from amends_runtime.core.definition import Plan, violations
from amends_runtime.testing.errors import (
    InsideEventLoop,
    InvalidScript,
    NotEnded,
    UnusedScript,
)
from amends_runtime.testing.quiet_log import QuietLog
from amends_runtime.testing.refusals import as_a_client_gets_them
from amends_runtime.testing.saga_under_test import AT_REST, SagaUnderTest, named
from amends_runtime.testing.scripts import ScriptedParticipant
from amends_runtime.testing.world import Halt, World

__all__ = ["DEFAULT_LIMIT_S", "SagaTest"]

DEFAULT_LIMIT_S: Final = 7 * 86_400.0
"""A saga that has not ended after a week of virtual time will not: the runtime's own give-up clocks
stop after a day of trying."""


class SagaTest:
    """A test of one or more definitions. Use it in a `with` block.

    ::

        with SagaTest(order) as test:
            test.participant("payments").execute("charge").rejects("card_declined")
            saga = test.run({"order_id": "A-1", "cents": 4200})
            assert saga.state == amends.SagaState.COMPENSATED
            assert test.course == ["execute reserve", "execute charge", "compensate reserve"]
            assert test.effects == []

    Every action that is not scripted takes effect, with no result. Nothing takes time but what is
    scripted to, and the waits of the runtime; they cost none.

    `strict`: a script that was never asked for fails the test at the end of the block. `limit_s` is
    how much virtual time a saga is given to end. `crash_at` are the numbers of the moments at which
    the runtime is killed and started again: `every_crash` counts them.

    Raises `amends.InvalidDefinition` with everything that is wrong with a definition. Entering the
    block raises `InsideEventLoop` where a loop is running, leaving it `UnusedScript`.
    """

    def __init__(
        self,
        *definitions: amends.Definition,
        strict: bool = True,
        limit_s: float = DEFAULT_LIMIT_S,
        crash_at: tuple[int, ...] = (),
    ) -> None:
        if not definitions:
            raise TypeError("SagaTest tests definitions: give it at least one")
        for each in definitions:
            if not isinstance(each, amends.Definition):
                raise TypeError(_no_definition(each))
        self._plans = {definition.name: _plan(definition) for definition in definitions}
        if len(self._plans) < len(definitions):
            raise ValueError(
                "two of the definitions have the same name: test one version at a time"
            )
        self._strict = strict
        self._limit_s = checked_seconds("limit_s", limit_s)
        self._crash_at = frozenset(crash_at)
        self._log = QuietLog()
        self._open: World | None = None
        self._entered = False
        self._last_number = 0
        self.moments = 0
        """How many moments the course had at which the runtime can be killed. Set at its end."""

    def __enter__(self) -> Self:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise InsideEventLoop
        if self._entered:
            raise RuntimeError("a SagaTest is entered once: make another one")
        self._entered = True
        self._log.begin()
        try:
            self._open = World(
                list(self._plans.values()), breaker=BreakerPolicy(), crash_at=self._crash_at
            )
        except BaseException:
            self._log.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        world = self._world
        unused = self.unused
        self.moments = world.moments
        if error is not None:
            for crash in world.crashes:
                error.add_note(f"the runtime was killed at {crash}")
        try:
            world.close()
        finally:
            self._open = None
            self._log.end()
        if error is None and self._strict and unused:
            raise UnusedScript(unused)

    # -- the participants ----------------------------------------------------------------------

    def participant(self, name: str) -> ScriptedParticipant:
        """A participant, to be scripted and looked at.

        Raises `InvalidScript` for one that no definition names.
        """
        service = self._world.services.get(name)
        if service is None:
            known = nearest(name, self._world.services, "participants")
            raise InvalidScript(f"no definition names a participant {name!r}; {known}")
        return ScriptedParticipant(service, self._breaker)

    def _breaker(self, participant: str) -> amends.BreakerInfo:
        breaker = self._world.lane(participant).breaker
        return breaker_from_wire(wire.breaker_to_proto(participant, breaker))

    @property
    def unused(self) -> tuple[str, ...]:
        """The actions that are scripted and were never asked."""
        return tuple(
            repr(script)
            for service in self._world.services.values()
            for script in service.scripts.values()
            if script.is_scripted and not script.calls
        )

    # -- sagas ---------------------------------------------------------------------------------

    def run(
        self,
        input: object = None,  # noqa: A002  # the word that the contract and the handlers use
        *,
        definition: str | None = None,
        saga_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> amends.Saga:
        """Start a saga and run it to its end, or until it is stuck.

        Arguments as in `start`. Raises what `start` and `SagaUnderTest.result` raise.
        """
        return self.start(
            input, definition=definition, saga_id=saga_id, labels=labels, deadline_s=deadline_s
        ).result()

    def start(
        self,
        input: object = None,  # noqa: A002  # as in `run`
        *,
        definition: str | None = None,
        saga_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        deadline_s: float | None = None,
    ) -> SagaUnderTest:
        """Start a saga, durably; nothing has been called yet when this returns.

        Arguments as in `amends.Client.start`. The definition's name may be left out where there is
        one; ids are by default ``saga-1``, ``saga-2``, and so on. Raises as it does.
        """
        request = self._request(input, definition, saga_id, labels, deadline_s)
        with as_a_client_gets_them():
            self._world.ask(lambda supervisor: supervisor.start_saga(request))
        return self._handle(request.saga_id)

    def saga(self, saga_id: str | None = None) -> SagaUnderTest:
        """A saga that was started; without an id the only one.

        Raises KeyError for an id that there is not, ValueError if it is not clear which one.
        """
        known = self._world.readings.saga_ids()
        if saga_id is None and len(known) == 1:
            return self._handle(known[0])
        if saga_id is None:
            raise ValueError(f"there are {len(known)} sagas: say which one")
        if saga_id not in known:
            raise KeyError(f"there is no saga {saga_id!r}; {nearest(saga_id, known, 'sagas')}")
        return self._handle(saga_id)

    def finish(self) -> list[amends.Saga]:
        """Run all sagas to their ends, or until they are stuck; in the order of their start.

        Raises `NotEnded`.
        """
        readings = self._world.readings
        started = readings.saga_ids()
        under_way = started[::-1]

        def all_at_rest() -> bool:
            while under_way and readings.saga(under_way[-1]).state in AT_REST:
                under_way.pop()  # so that a thousand sagas are not all looked at a thousand times
            return not under_way

        self._drive(all_at_rest, "all sagas were to end")
        return [readings.shown(one) for one in started]

    # -- time ----------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Let so much virtual time pass, with everything that happens in it."""
        seconds = checked_seconds("seconds", seconds)
        if self._world.pass_time(seconds) is Halt.CALLS:
            raise NotEnded(self._standing("the calls were to come to an end", Halt.CALLS))

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Go on until the condition holds, and stop exactly there. Raises `NotEnded`.

        It is looked at before and after each commit, and before and after each call; after a call
        its effect is there, and the runtime does not know yet.
        """
        self._drive(condition, "the condition was to hold")

    def restart(self, down_s: float = 0.0) -> None:
        """Kill the runtime where it stands, and start it again on the same store.

        Whatever it had in memory is gone, and calls that it had sent have no one to answer to.
        Participants live on. It is down for `down_s` of virtual time.
        """
        self._world.restart(checked_seconds("down_s", down_s, least=0.0))

    @property
    def elapsed_s(self) -> float:
        """Virtual seconds since the block was entered."""
        return round(self._world.time_s, 3)

    @property
    def now_ms(self) -> int:
        """The wall clock's time, in UTC milliseconds, as handlers and records see it."""
        return self._world.clock.now_ms()

    # -- what happened -------------------------------------------------------------------------

    @property
    def course(self) -> list[str]:
        """What participants were asked, in order, as ``execute charge``: verb and step."""
        return [named(call) for call in self._world.outside.calls]

    @property
    def calls(self) -> list[amends.Call]:
        """What participants were asked, in order, with inputs, results, rounds and attempts."""
        return list(self._world.outside.calls)

    @property
    def effects(self) -> list[str]:
        """The steps that took effect and were not undone, in the order in which they did.

        Empty after a saga was compensated. Read-only steps have no effect. In a two-phase commit a
        step takes effect when it is committed; see `held`.
        """
        return [effect.step for effect in self._world.outside.ledger]

    @property
    def held(self) -> list[str]:
        """The steps of two-phase commits that have voted yes and were not told the decision.

        In the order of their votes. Empty once a saga has ended.
        """
        return [effect.step for effect in self._world.outside.held]

    @property
    def crashes(self) -> list[str]:
        """Where the runtime was killed by `crash_at`."""
        return list(self._world.crashes)

    # -- inside --------------------------------------------------------------------------------

    @property
    def _world(self) -> World:
        if self._open is None:
            raise RuntimeError("use it inside its block: `with SagaTest(definition) as test:`")
        return self._open

    def _handle(self, saga_id: str) -> SagaUnderTest:
        return SagaUnderTest(saga_id, self._world, self._drive)

    def _request(
        self,
        input_: object,
        definition: str | None,
        saga_id: str | None,
        labels: Mapping[str, str] | None,
        deadline_s: float | None,
    ) -> StartRequest:
        if definition is None:
            if len(self._plans) > 1:
                names = ", ".join(map(repr, self._plans))
                raise ValueError(f"say which definition to start: definition= one of {names}")
            (definition,) = self._plans
        if saga_id is None:
            self._last_number += 1
            saga_id = f"saga-{self._last_number}"
        deadline = 0 if deadline_s is None else checked_seconds("deadline_s", deadline_s)
        checks = Checks()
        with as_a_client_gets_them():
            checks.new_saga_id("saga_id", checked_text("saga_id", saga_id))
            name = checks.definition_name("definition", checked_text("definition", definition))
            payload = to_wire(EMPTY if input_ is None else encode(input_))
            content = checks.payload("input", payload, wire.MAX_PAYLOAD_BYTES)
            checked = checks.labels("labels", checked_labels(labels))
            deadline_ms = checks.duration_ms("deadline_s", round(deadline * 1000))
            checks.passed()
        return StartRequest(
            saga_id=saga_id,
            definition_name=name,
            content_hash=wire.start_content_hash(name, "", content, checked, deadline_ms),
            input=content,
            labels=checked,
            deadline_ms=deadline_ms,
        )

    def _drive(self, until: Callable[[], bool], wanted: str) -> None:
        halt = self._world.drive(until, self._limit_s)
        if halt is not Halt.REACHED:
            raise NotEnded(self._standing(wanted, halt))

    def _standing(self, wanted: str, halt: Halt) -> str:
        """Where everything stands, for the reader of a failed test."""
        world = self._world
        calls = len(world.outside.calls)
        why = {
            Halt.CALLS: "too many calls",
            Halt.QUIET: "nothing is left that could happen",
        }.get(halt, f"{self._limit_s:g} s are the limit")
        said = f"{wanted}; that has not come about in {self.elapsed_s:g} s and {calls} calls"
        lines = [f"{said} ({why}):"]
        for saga_id in world.readings.saga_ids():
            asked = Counter(self.saga(saga_id).course)
            lines += _lines_of(world.readings.shown(saga_id), asked)
        for name, service in world.services.items():
            breaker = self._breaker(name)
            if service.is_down or breaker.state is not amends.BreakerState.CLOSED:
                state = "is down" if service.is_down else "is up"
                lines.append(f"  participant {name} {state}; its breaker is {breaker.state}")
        return "\n".join(lines)


def _no_definition(given: object) -> str:
    kind = type(given).__name__
    if isinstance(given, str | os.PathLike):
        path = os.fspath(given)
        return (
            f"SagaTest tests definitions, not files; {path!r} is a {kind}: read it first, with"
            f" SagaTest(amends.Definition.from_file({path!r}))"
        )
    return f"SagaTest tests definitions, as amends.Definition makes them, not a {kind}"


def _plan(definition: amends.Definition) -> Plan:
    """The definition as the runtime works it out.

    Raises `amends.InvalidDefinition` with everything that registration would refuse.
    """
    message = definition.to_proto()
    content, unreadable = wire.read_definition(message)
    problems = [DefinitionProblem(_path(one.field), one.message) for one in unreadable]
    if not problems:
        problems = [
            DefinitionProblem(_path(one.field), one.message, one.step)
            for one in violations(content)
        ]
    if problems:
        raise amends.InvalidDefinition(problems, definition.name)
    return Plan(content)


def _path(field: str) -> tuple[str | int, ...]:
    """The way to a field that the runtime names, as the SDK writes it: in a step without `call`."""
    parts = [part for part in re.split(r"[.\[\]]+", field) if part and part != "call"]
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _lines_of(saga: amends.Saga, asked: Counter[str]) -> list[str]:
    """A saga and its steps; one that has ended in one line."""
    turned = f", turned back by {saga.turn.cause} {saga.turn.step}".rstrip() if saga.turn else ""
    lines = [f"  saga {saga.saga_id} ({saga.definition}) is {saga.state}{turned}"]
    for step in () if saga.ended else saga.steps:
        line = f"    {step.name}: {step.state}"
        if step.attempt:
            times = asked[f"{step.verb} {step.name}"]
            line += f", attempt {step.attempt} to {step.verb}, asked {times} times"
        if step.call_open:
            line += ", a call is open"
        if step.last_error is not None:
            line += f"; last error {step.last_error}"
        lines.append(line)
    return lines
