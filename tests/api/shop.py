"""A participant whose actions do what a test tells them to, and the saga that uses it."""

from collections.abc import Awaitable, Callable

import anyio

import amends
from amends_runtime.core.definition import Definition, Kind, RetryPolicy, Step

PATIENT = RetryPolicy(first_ms=1, max_ms=1, give_up_after_ms=86_400_000)

ORDER = Definition(
    name="order",
    steps=(
        Step(name="reserve", participant="shop", action="reserve", retry=PATIENT),
        Step(name="ship", participant="shop", action="ship", kind=Kind.PIVOT, retry=PATIENT),
        Step(name="notify", participant="shop", action="notify", kind=Kind.RETRIABLE),
    ),
)

Behaviour = Callable[[amends.Call], Awaitable[object]]


class Held:
    """An action that begins, says so, and waits until it is let go; then it answers."""

    def __init__(self, outcome: object = None) -> None:
        self.begun = anyio.Event()
        self.let_go = anyio.Event()
        self._outcome = outcome

    async def __call__(self, call: amends.Call) -> object:
        """Answers like any behaviour, later."""
        self.begun.set()
        await self.let_go.wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class Shop:
    """Does every action at once, unless `behaviours` has something else for it."""

    def __init__(self) -> None:
        self.address = ""
        self.behaviours: dict[str, Behaviour] = {}
        self.calls: list[amends.Call] = []

    def participant(self) -> amends.Participant:
        """The participant to be served."""
        participant = amends.Participant("shop", barrier=None)
        for action in ("reserve", "ship", "notify"):
            participant.execute(action, compensatable=action == "reserve")(self._execute)
        participant.compensate("reserve")(self._compensate)
        return participant

    def hold(self, action: str, outcome: object = None) -> Held:
        """From now on the action waits; what it answers then is `outcome`."""
        held = self.behaviours[action] = Held(outcome)
        return held

    async def _execute(self, call: amends.Call) -> object:
        self.calls.append(call)
        behaviour = self.behaviours.get(call.action)
        return None if behaviour is None else await behaviour(call)

    async def _compensate(self, call: amends.Call) -> None:
        self.calls.append(call)
