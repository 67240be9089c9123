"""Scripts: what a participant's actions answer, written as the SDK's decorators are.

    payments = test.participant("payments")

    payments.execute("charge").rejects("card_declined")
    payments.execute("charge").answers(Status("UNAVAILABLE"), LostReply(), {"charged_cents": 4200})
    payments.compensate("charge").fails(times=3)


    @payments.execute("charge")
    def charge(call: amends.Call) -> dict[str, int]: ...

An action without a script takes effect, with no result. Several answers are for successive calls of
one step, polls included; the last one is for all that follow. Where the barrier already knows what
became of a step, that is the answer, as with a real participant: an effect does not happen twice.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import amends
from amends.definition_checks import nearest
from amends_runtime.testing.answers import Prepared, Status, prepared
from amends_runtime.testing.errors import InvalidScript

if TYPE_CHECKING:
    from amends_runtime.testing.service import Service  # which imports this module

__all__ = ["ScriptedAction", "ScriptedParticipant"]

H = TypeVar("H", bound=Callable[[amends.Call], object])


class ScriptedAction:
    """One verb of one action of a participant: what it answers, and with what it was called."""

    def __init__(self, participant: str, verb: amends.Verb, action: str) -> None:
        self.calls: list[amends.Call] = []
        """What has reached it, in order: inputs, results, rounds, attempts."""
        self.handler: Callable[[amends.Call], object] | None = None
        """The function that answers, if there is one."""
        self.is_scripted = False
        """Whether anything was said of it."""
        self._participant = participant
        self._verb = verb
        self._action = action
        self._answers: tuple[Prepared, ...] = (amends.Done(),)
        self._asked: Counter[tuple[str, str]] = Counter()

    def __repr__(self) -> str:
        return f'{self._participant}.{self._verb}("{self._action}")'

    def __call__(self, handler: H) -> H:
        """Let a function answer: `def` or `async def`, as a participant's own.

        It takes the `amends.Call` alone. It may return and raise what a real one may, and return
        the kit's own answers, too. An AssertionError in it fails the test, whatever else it raises
        is an unknown outcome. An `async def` one may wait for virtual time only.
        """
        try:
            inspect.signature(handler).bind(None)
        except TypeError:
            raise InvalidScript(
                f"the handler of {self!r} must take the call alone: there is no database here. Test"
                " handlers that take a transaction with amends.serve and a real barrier"
            ) from None
        self._set((amends.Done(),))
        self.handler = handler
        return handler

    def answers(self, *answers: object) -> None:
        """Answer with these, one for each successive call of a step, and then with the last one.

        Replaces what was scripted before. For the answers that there are see `answers.py`. Raises
        `InvalidScript` or `amends.PayloadError`.
        """
        if not answers:
            raise InvalidScript(f"{self!r}.answers() says nothing: give at least one answer")
        self._set(tuple(prepared(answer, self._verb) for answer in answers))

    def rejects(self, reason: str, message: str = "") -> None:
        """Refuse, as a handler that raises ``amends.Rejected(reason, message)``."""
        self.answers(amends.Rejected(reason, message))

    def fails(self, status: str = "UNAVAILABLE", *, times: int | None = None) -> None:
        """End calls with a gRPC error status and without an effect.

        The first so many `times` for each step, and then take effect; by default always.
        """
        if times is None:
            self.answers(Status(status))
        elif times < 1:
            raise InvalidScript(f"{self!r}.fails(times={times}): at least once, or not at all")
        else:
            self.answers(*[Status(status)] * times, None)

    def next_answer(self, call: amends.Call) -> Prepared:
        """The answer to this call, if no handler gives it. For the participant's side."""
        step = call.saga_id, call.step
        number = self._asked[step]
        self._asked[step] += 1
        return self._answers[min(number, len(self._answers) - 1)]

    def _set(self, answers: tuple[Prepared, ...]) -> None:
        self.is_scripted = True
        self.handler = None
        self._answers = answers
        self._asked.clear()


class ScriptedParticipant:
    """A participant under test: its actions, whether it is up, and the breaker before it."""

    def __init__(
        self,
        service: Service,
        breaker: Callable[[str], amends.BreakerInfo],
    ) -> None:
        self.name = service.name
        """Its name in the definitions."""
        self._service = service
        self._breaker = breaker

    def __repr__(self) -> str:
        return f"<ScriptedParticipant {self.name!r}{' (down)' if self._service.is_down else ''}>"

    def execute(self, action: str) -> ScriptedAction:
        """The action's Execute. Raises `InvalidScript` for one that no definition asks for."""
        return self._action(amends.Verb.EXECUTE, action)

    def compensate(self, action: str) -> ScriptedAction:
        """The action's Compensate. Raises `InvalidScript` for one that no definition asks for."""
        return self._action(amends.Verb.COMPENSATE, action)

    def prepare(self, action: str) -> ScriptedAction:
        """The action's Prepare, its vote in a two-phase commit.

        Raises `InvalidScript` for one that no definition asks for.
        """
        return self._action(amends.Verb.PREPARE, action)

    @property
    def calls(self) -> list[amends.Call]:
        """What has reached it, in order. What came while it was down has not."""
        return list(self._service.calls)

    def down(self, for_s: float | None = None) -> None:
        """Take it down now, for so many seconds of virtual time or until `up`.

        What it was working on is rolled back; calls find nobody.
        """
        self._service.go_down(for_s)

    def up(self) -> None:
        """Let it answer again. The runtime notices when its breaker probes it next."""
        self._service.come_up()

    def breaker(self) -> amends.BreakerInfo:
        """The runtime's circuit breaker in front of it. A restart of the runtime resets it."""
        return self._breaker(self.name)

    def _action(self, verb: amends.Verb, action: str) -> ScriptedAction:
        scripts: Mapping[tuple[str, amends.Verb], ScriptedAction] = self._service.scripts
        script = scripts.get((action, verb))
        if script is not None:
            return script
        if (action, amends.Verb.EXECUTE) in scripts and verb is amends.Verb.PREPARE:
            raise InvalidScript(
                f"{self.name}'s action {action!r} is never prepared: no two-phase commit asks for"
                " it"
            )
        if (action, amends.Verb.EXECUTE) in scripts:
            raise InvalidScript(
                f"{self.name}'s action {action!r} is never compensated: no compensatable step"
                " asks for it"
            )
        actions: dict[str, Any] = dict.fromkeys(known for known, _ in scripts)
        raise InvalidScript(
            f"no step asks {self.name} for an action {action!r};"
            f" {nearest(action, actions, 'actions')}"
        )
