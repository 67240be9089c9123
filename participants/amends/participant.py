"""A participant: its name, its actions, and the checks that keep a wrong one from being served."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from types import NoneType
from typing import Any, Final, TypeVar, overload

from amends.barrier import Barrier
from amends.barrier.absent import NoBarrier
from amends.barrier.port import completes_votes
from amends.errors import InvalidParticipant
from amends.handler import Handler, is_async, locate
from amends.outcomes import Call, Verb

H = TypeVar("H", bound=Callable[[Call], object] | Callable[[Call, Any], object])

NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,47}")
"""Names of participants: they stand in definitions, in configuration and in logs."""

ACTION: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
"""Names of actions."""


class _Unsaid(Enum):
    """What `barrier` is if the author said nothing, which is not the same as None."""

    UNSAID = "unsaid"


@dataclass(frozen=True, slots=True)
class _Registration:
    """A function under a decorator, as it was given; judged later, all at once."""

    verb: Verb
    action: str
    function: Callable[..., object]
    compensatable: bool

    @property
    def where(self) -> str:
        return locate(self.function)


class Participant:
    """The handlers of one service, by action and verb, and the barrier before them.

    ::

        payments = Participant("payments", barrier=SqliteBarrier("payments.db"))


        @payments.execute("charge")
        def charge(call: Call, tx: Transaction) -> dict[str, str]: ...

    A handler is a `def` or `async def` function that takes the `Call`, or the `Call` and the open
    transaction of the barrier's database; what it may return and raise stands in `outcomes.py`. The
    decorators give the function back unchanged. Nothing is checked before `serve`, which then lists
    every fault at once.

    `barrier` has to be said. With ``barrier=None``, for effects outside any database, handlers are
    called directly, which is weaker: see `barrier/absent.py`. Raises `TypeError` if it is left out.

    A runtime says whom a call is for, by the name that the participant is registered by there, and
    one for another name is refused. Where that name differs from `name`, or where one program is
    registered by several, `aliases` has the others.

    A barrier that completes votes, as `PreparedTransactions` does, commits and rolls back by itself
    what a vote has prepared: beside it there are `prepare` handlers and no others.
    """

    @overload
    def __init__(self, name: str, *, barrier: Barrier, aliases: Collection[str] = ()) -> None: ...

    @overload
    def __init__(self, name: str, *, barrier: None, aliases: Collection[str] = ()) -> None: ...

    def __init__(
        self,
        name: str,
        *,
        barrier: Barrier | _Unsaid | None = _Unsaid.UNSAID,
        aliases: Collection[str] = (),
    ) -> None:
        if isinstance(barrier, _Unsaid):
            raise TypeError(
                f"Participant({name!r}): say barrier=amends.SqliteBarrier(…), or barrier=None if "
                "an effect outside any database makes that impossible: then repeated calls run the "
                "handler again"
            )
        self.name = name
        self.aliases = aliases
        self.barrier: Barrier = NoBarrier() if barrier is None else barrier
        self._registrations: list[_Registration] = []
        self._unused: dict[object, str] = {}
        self._faults: list[str] = []

    def __repr__(self) -> str:
        return f"<Participant {self.name!r}: {', '.join(self.actions()) or 'no actions'}>"

    # --------------------------------------------------------------------------- decorators

    def execute(self, action: str, *, compensatable: bool = True) -> Callable[[H], H]:
        """Register the function that does an action; in two-phase commit: that commits it.

        Say ``compensatable=False`` for an action that has no compensation, to be used in pivot,
        retriable and read-only steps.
        """
        return self._decorator(Verb.EXECUTE, action, compensatable=compensatable)

    def compensate(self, action: str) -> Callable[[H], H]:
        """Register the function that undoes an action; in two-phase commit: that rolls it back.

        It may not refuse. With a barrier it is called only if the action took effect, and once.
        """
        return self._decorator(Verb.COMPENSATE, action)

    def prepare(self, action: str) -> Callable[[H], H]:
        """Register the function that votes on an action (two-phase commit only)."""
        return self._decorator(Verb.PREPARE, action)

    def _decorator(
        self, verb: Verb, action: str, *, compensatable: bool = True
    ) -> Callable[[H], H]:
        caller = sys._getframe(2)  # noqa: SLF001  # the author's line is what a fault must name
        where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        if callable(action):
            # Written as `@p.execute`, without an action: the function comes where the name belongs.
            self._faults.append(
                f'{locate(action)}: @{self.name}.{verb} has no action name; write @….{verb}("…")'
            )
            return action  # the author's name must stay bound to his function
        token = object()
        self._unused[token] = f'{where}: .{verb}("{action}") decorates nothing'

        def register(function: H) -> H:
            self._unused.pop(token, None)
            self._registrations.append(_Registration(verb, action, function, compensatable))
            return function

        return register

    # ---------------------------------------------------------------------------- what it has

    def actions(self) -> list[str]:
        """Name the actions that can be executed or, if the barrier does that, prepared; sorted."""
        return sorted({r.action for r in self._registrations if r.verb is self._leading_verb})

    def handlers(self) -> dict[tuple[str, Verb], Handler]:
        """Give the checked handlers. Raises `InvalidParticipant` that lists every fault."""
        faults = [*self._faults, *self._unused.values(), *self._faults_found()]
        if faults:
            raise InvalidParticipant(self.name, sorted(set(faults)))
        return {
            (r.action, r.verb): Handler(
                verb=r.verb,
                action=r.action,
                function=r.function,
                where=r.where,
                is_async=is_async(r.function),
                takes_transaction=len(_positional(r.function)) == 2,
            )
            for r in self._registrations
        }

    @property
    def _completes_votes(self) -> bool:
        """Whether the barrier commits and rolls back by itself what a vote has prepared."""
        return completes_votes(self.barrier)

    @property
    def _leading_verb(self) -> Verb:
        """The verb that makes an action."""
        return Verb.PREPARE if self._completes_votes else Verb.EXECUTE

    # ----------------------------------------------------------------------------- the checks

    def _faults_found(self) -> Iterator[str]:
        if not _matches(NAME, self.name):
            yield f"the name {self.name!r} is not one for a participant: {_NAME_RULE}"
        yield from self._alias_faults()
        verb = self._leading_verb
        if not any(r.verb is verb for r in self._registrations):
            yield f'no action is registered: decorate a function with @….{verb}("…")'
        yield from self._barrier_faults()
        for registration in self._registrations:
            yield from self._faults_of(registration)
        yield from self._duplicates()
        yield from self._partners_missing()
        yield from self._undecorated()

    def _alias_faults(self) -> Iterator[str]:
        aliases: object = self.aliases
        match aliases:
            case str():
                # Each letter of it would be an alias.
                yield f"aliases= was given a text: write aliases=[{aliases!r}]"
            case Collection():
                for alias in aliases:
                    if not _matches(NAME, alias):
                        yield f"the alias {alias!r} is not a name for a participant: {_NAME_RULE}"
            case _:
                yield (
                    f"aliases= was given an object of type {type(aliases).__name__}: give it a "
                    "list of names"
                )

    def _barrier_faults(self) -> Iterator[str]:
        barrier: object = self.barrier
        missing = [name for name in _OF_A_BARRIER if not hasattr(barrier, name)]
        match barrier:
            case str() | os.PathLike():
                yield (
                    f"barrier= was given a path: write barrier=SqliteBarrier("
                    f'"{os.fspath(barrier)}")'
                )
            case type():
                yield f'barrier= was given a class: write barrier={barrier.__name__}("…")'
            case _ if missing:
                yield (
                    f"barrier= was given an object of type {type(barrier).__name__}, which has no "
                    f"{', '.join(missing)}: give it a SqliteBarrier(…), or all of amends.Barrier"
                )
            case _:
                pass

    def _faults_of(self, registration: _Registration) -> Iterator[str]:
        where, function = registration.where, registration.function
        action = registration.action
        if not _matches(ACTION, action):
            yield (
                f"{where}: {action!r} is not a name for an action: use letters, digits, _ . and -, "
                "beginning with a letter, at most 64"
            )
        if isinstance(function, type) or not callable(function):
            yield f"{where}: {registration.verb} {action!r} is not a function"
            return
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            yield f"{where}: {registration.verb} {action!r} is a generator; return, do not yield"
            return
        yield from self._signature_faults(registration)

    def _signature_faults(self, registration: _Registration) -> Iterator[str]:
        where, function = registration.where, registration.function
        subject = f"{where}: {registration.verb} {registration.action!r}"
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            yield f"{subject} has no signature that Python can read; wrap it in a function"
            return
        others = [p for p in parameters if p.kind not in _POSITIONAL]
        count = len(parameters) - len(others)
        if any(p.kind is not p.KEYWORD_ONLY or p.default is p.empty for p in others) or (
            count not in (1, 2)
        ):
            got = ", ".join(map(_shape, parameters)) or "nothing"
            yield f"{subject} takes ({got}); a handler takes (call) or (call, tx)"
            return
        names = [_last_word(p.annotation) for p in parameters]
        if parameters[0].name in ("self", "cls"):
            yield (
                f"{subject} is a method without its object; register the bound method: "
                f'….{registration.verb}("{registration.action}")(service.method)'
            )
        elif names[1:2] == [Call.__name__]:
            yield f"{subject} takes (tx, call); a handler takes (call) or (call, tx)"
        elif count == 2:
            yield from self._transaction_faults(registration, parameters)

    def _transaction_faults(
        self, registration: _Registration, parameters: list[inspect.Parameter]
    ) -> Iterator[str]:
        subject = f"{registration.where}: {registration.verb} {registration.action!r}"
        if isinstance(self.barrier, NoBarrier):
            yield (
                f"{subject} takes a transaction, and participant {self.name!r} has no barrier: "
                "give it one (barrier=SqliteBarrier(…)), or take (call) only"
            )
            return
        if any(self._barrier_faults()):
            return  # told already; nobody knows what it would hand over
        for_def, for_async = self.barrier.transaction_types
        if is_async(registration.function):
            kind, wanted, other = "async def", for_async, for_def
        else:
            kind, wanted, other = "def", for_def, for_async
        if wanted is NoneType:
            yield (
                f"{subject} is {kind} and takes a transaction, and {type(self.barrier).__name__} "
                f"has one for {'async def' if kind == 'def' else 'def'} handlers only, of type "
                f"{other.__name__}: write it so, or take (call) only"
            )
            return
        annotation = _last_word(parameters[1].annotation)
        if annotation == other.__name__:
            yield (
                f"{subject} is {kind} and annotates its transaction as {annotation}; "
                f"it is given an {wanted.__name__}"
            )

    def _duplicates(self) -> Iterator[str]:
        seen: dict[tuple[str, Verb], str] = {}
        for registration in self._registrations:
            key = registration.action, registration.verb
            if key in seen:
                yield (
                    f"{registration.where}: {registration.verb} {registration.action!r} is "
                    f"registered twice; the first is at {seen[key]}"
                )
            seen.setdefault(key, registration.where)

    def _partners_missing(self) -> Iterator[str]:
        if self._completes_votes:
            yield from self._partners_too_many()
            return
        by_verb = {verb: {r.action for r in self._registrations if r.verb is verb} for verb in Verb}
        executed, compensated = by_verb[Verb.EXECUTE], by_verb[Verb.COMPENSATE]
        prepared = by_verb[Verb.PREPARE]
        for r in self._registrations:
            if r.verb is not Verb.EXECUTE:
                if r.action not in executed:
                    hint = _nearest(r.action, executed - compensated)
                    yield f"{r.where}: {r.verb} {r.action!r} has no execute{hint}"
            elif r.compensatable and r.action not in compensated:
                hint = _nearest(r.action, compensated - executed)
                # What is prepared must be able to be rolled back.
                other = (
                    f', or say @….execute("{r.action}", compensatable=False)'
                    if r.action not in prepared
                    else ""
                )
                yield f"{r.where}: execute {r.action!r} has no compensate{hint}; write one{other}"
            elif not r.compensatable and r.action in prepared:
                yield (
                    f"{r.where}: execute {r.action!r} says compensatable=False, and there is a "
                    "prepare for it: what is prepared must be able to be rolled back; leave "
                    "compensatable=False out, and write a compensate"
                )
            elif not r.compensatable and r.action in compensated:
                yield (
                    f"{r.where}: execute {r.action!r} says compensatable=False, and there is a "
                    "compensate for it; remove one of the two"
                )

    def _partners_too_many(self) -> Iterator[str]:
        barrier = type(self.barrier).__name__
        for r in self._registrations:
            if r.verb is not Verb.PREPARE:
                does = "commits" if r.verb is Verb.EXECUTE else "rolls back"
                yield (
                    f"{r.where}: {r.verb} {r.action!r} would never run: {barrier} {does} by itself "
                    f"what prepare has done; remove it, and write prepare {r.action!r} alone"
                )

    def _undecorated(self) -> Iterator[str]:
        """Find functions beside the handlers that look meant: named by a verb, taking a `Call`.

        One that begins with ``_`` is private and means nothing.
        """
        registered = {id(inspect.unwrap(r.function)) for r in self._registrations}
        modules = {getattr(r.function, "__module__", None) for r in self._registrations}
        verbs = {verb.value for verb in Verb}
        for name in sorted(module for module in modules if module in sys.modules):
            for symbol, thing in vars(sys.modules[name]).items():
                if (
                    inspect.isfunction(thing)
                    and thing.__module__ == name
                    and id(inspect.unwrap(thing)) not in registered
                    and verbs & set(symbol.lower().split("_"))
                    and not symbol.startswith("_")
                    and _takes_call(thing)
                ):
                    yield (
                        f"{locate(thing)}: {symbol} takes a Call and no decorator registers it; "
                        f"decorate it, or name it _{symbol} if it is no handler"
                    )


_NAME_RULE: Final = "use lower-case letters, digits, _ and -, beginning with a letter, at most 48"

_OF_A_BARRIER: Final = ("transaction_types", "open", "run", "aclose")

_POSITIONAL: Final = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def _matches(pattern: re.Pattern[str], name: object) -> bool:
    return isinstance(name, str) and pattern.fullmatch(name) is not None


def _positional(function: Callable[..., object]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind in _POSITIONAL]


def _shape(parameter: inspect.Parameter) -> str:
    return str(parameter.replace(annotation=inspect.Parameter.empty))


def _last_word(annotation: object) -> str:
    """Give the bare name of an annotation, which may be a class or text."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    # What stands in brackets are its parameters: psycopg's connections have some.
    return str(text).partition("[")[0].rpartition(".")[2]


def _takes_call(function: Callable[..., object]) -> bool:
    parameters = _positional(function)
    return len(parameters) in (1, 2) and _last_word(parameters[0].annotation) == Call.__name__


def _nearest(action: str, candidates: set[str]) -> str:
    close = difflib.get_close_matches(action, candidates, n=1)
    return f" (is {close[0]!r} misspelt, or this?)" if close else ""
