"""The switches: what is to go wrong in the shop, read from a JSON file.

The file may be missing (nothing goes wrong) and may be replaced at any time; it is read again when
its inode, time or size has changed, so replace it as `write_switches` does. One file may serve all
four services and the bank's branches; each reads its own part:

.. code-block:: json

    {
      "seed": 7,
      "payments": {
        "down": false,
        "charge": {"decline": 0.1, "lose_reply": {"next": 1}},
        "refund": {"slow": 1, "slow_s": 0.5, "fail_before": 0.2}
      },
      "bank-west": {"prepare_credit": {"hold_reply": {"next": 1}}}
    }

==================  ===============================================================================
`seed`              of every probability; default 0. The same seed decides the same way for the
                    same call, in whatever order calls come and however often processes die
`down`              true: the service does not listen, and its connections are cut
*operation*         the name of an effect: place, cancel, confirm; charge, refund; reserve,
                    release; ship. Of a branch: prepare, commit or roll_back, and the action:
                    ``prepare_debit``, ``commit_credit``, ``roll_back_collect``
`decline`           refuse, for a business reason (what does something, or votes)
`slow`, `slow_s`    wait for so many seconds (default 1, at most 600) before doing anything
`hold`              wait before doing anything, until the file changes
`fail_before`       answer with an error, and do nothing
`break_vote`        do the contrary of what was decided, and then be asked (commit and roll_back)
`lose_reply`        do it, commit it, and answer with an error
`hold_reply`        do it, commit it, and keep the answer back until the file changes
==================  ===============================================================================

All but the first three, and `slow_s`, are chances: a probability from 0 to 1 for each attempt
(`decline`: for each step and round), or ``{"next": N}``, the next N times, counted anew whenever
the file changes. Who is held is let go by any change, and in the end by the call's own deadline.
"""

from __future__ import annotations

import enum
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeGuard

from shop import bank
from shop.bank import BRANCHES
from shop.catalogue import ACTIONS, SERVICES

MAX_SLOW_S: Final = 600.0
"""Longer than any attempt's deadline; beyond it a slip of the keyboard is likelier than a wish."""


class Fault(enum.StrEnum):
    """What can go wrong with one call; the values are the names in the file."""

    DECLINE = "decline"
    SLOW = "slow"
    HOLD = "hold"
    FAIL_BEFORE = "fail_before"
    BREAK_VOTE = "break_vote"
    LOSE_REPLY = "lose_reply"
    HOLD_REPLY = "hold_reply"


PROGRAMS: Final = (*SERVICES, *BRANCHES)
"""All whose part the file may have."""

_ALWAYS: Final = frozenset(Fault) - {Fault.DECLINE, Fault.BREAK_VOTE}

_OF_VERB: Final = {
    "prepare": _ALWAYS | {Fault.DECLINE},
    "commit": _ALWAYS | {Fault.BREAK_VOTE},
    "roll_back": _ALWAYS | {Fault.BREAK_VOTE},
}
"""What can go wrong with the three operations that an action of a branch has."""


@dataclass(frozen=True, slots=True)
class Chance:
    """How often a fault strikes: with a probability, or `next` times (then `p` says nothing)."""

    p: float = 0.0
    next: int | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """The faults of one operation."""

    chances: Mapping[Fault, Chance] = field(default_factory=lambda: MappingProxyType({}))
    slow_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Switches:
    """One service's part of the file."""

    seed: int = 0
    down: bool = False
    operations: Mapping[str, Operation] = field(default_factory=lambda: MappingProxyType({}))


class SwitchesError(ValueError):
    """The file cannot be used; `faults` names everything that is wrong, each with its place."""

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


def operations_of(service: str) -> dict[str, frozenset[Fault]]:
    """Name the operations of a service or branch, and what can go wrong with each."""
    named: dict[str, frozenset[Fault]] = {}
    for action in ACTIONS.values():
        if action.service == service:
            named[action.effect] = _ALWAYS | {Fault.DECLINE}
            if action.undo is not None:
                named[action.undo] = _ALWAYS
    for name in bank.ACTIONS.get(service, ()):
        named |= {f"{verb}_{name}": faults for verb, faults in _OF_VERB.items()}
    return named


def write_switches(path: Path, document: Mapping[str, Any]) -> None:
    """Replace the file at once, so that nobody reads half of it.

    Raises `SwitchesError` for a document that a service would refuse.
    """
    faults: dict[str, None] = {}
    for service in PROGRAMS:
        try:
            parse(document, service)
        except SwitchesError as error:
            faults |= dict.fromkeys(error.faults)
    if faults:
        raise SwitchesError(*faults)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def parse(document: object, service: str) -> Switches:
    """Read one service's part of the whole document. Raises `SwitchesError`."""
    if not isinstance(document, dict):
        raise SwitchesError("the switches are not a JSON object")
    faults = [
        f"{name}: unknown; known are seed, {', '.join(PROGRAMS)}"
        for name in document
        if name != "seed" and name not in PROGRAMS
    ]
    seed = document.get("seed", 0)
    if type(seed) is not int:
        faults.append("seed: must be a whole number")
        seed = 0
    part = document.get(service, {})
    if not isinstance(part, dict):
        raise SwitchesError(*faults, f"{service}: must be an object")
    down = part.get("down", False)
    if not isinstance(down, bool):
        faults.append(f"{service}.down: must be true or false")
    known = operations_of(service)
    operations: dict[str, Operation] = {}
    for name, value in part.items():
        if name == "down":
            continue
        if name not in known:
            faults.append(f"{service}.{name}: unknown; known are down, {', '.join(known)}")
        elif not isinstance(value, dict):
            faults.append(f"{service}.{name}: must be an object")
        else:
            allowed = [fault for fault in Fault if fault in known[name]]
            operations[name] = _operation(value, f"{service}.{name}", allowed, faults)
    if faults:
        raise SwitchesError(*faults)
    return Switches(seed, down, MappingProxyType(operations))


def _operation(
    value: Mapping[str, object], path: str, allowed: list[Fault], faults: list[str]
) -> Operation:
    chances: dict[Fault, Chance] = {}
    slow_s = 1.0
    for name, setting in value.items():
        if name == "slow_s":
            if _is_number(setting) and 0 < setting <= MAX_SLOW_S:
                slow_s = float(setting)
            else:
                faults.append(f"{path}.slow_s: must be a number above 0 and up to {MAX_SLOW_S:g}")
        elif name in allowed:
            chance = _chance(setting)
            if chance is None:
                faults.append(
                    f'{path}.{name}: must be a probability from 0 to 1, or {{"next": N}} with a '
                    "whole number of at least 1"
                )
            else:
                chances[Fault(name)] = chance
        else:
            faults.append(f"{path}.{name}: unknown; known are slow_s, {', '.join(allowed)}")
    return Operation(MappingProxyType(chances), slow_s)


def _chance(setting: object) -> Chance | None:
    match setting:
        case {"next": int() as times, **rest} if not rest and type(times) is int and times >= 1:
            return Chance(next=times)
        case int() | float() if _is_number(setting) and 0 <= setting <= 1:
            return Chance(p=float(setting))
        case _:
            return None


def _is_number(value: object) -> TypeGuard[int | float]:
    # A bool is an int in Python; NaN and infinities fail the comparisons that follow.
    return isinstance(value, int | float) and not isinstance(value, bool)


class SwitchBoard:
    """One service's switches, always as the file has them now.

    A file that cannot be used changes nothing: `complain` is given one line, once, and the switches
    stay as they were. May be used from several threads.
    """

    def __init__(self, path: Path, service: str, *, complain: Callable[[str], None]) -> None:
        self._path = path
        self._service = service
        self._complain = complain
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._switches = Switches()
        self._version = 0
        self._struck: Counter[tuple[str, Fault]] = Counter()

    def load(self) -> None:
        """Read the file for the first time. Raises `SwitchesError` if it cannot be used."""
        with self._lock:
            self._seen = _identity(self._path)
            self._switches = self._read()

    def current(self) -> Switches:
        """Give the switches, reading the file again if it has changed."""
        with self._lock:
            seen = _identity(self._path)
            if seen != self._seen:
                self._seen = seen
                self._version += 1
                self._struck.clear()
                try:
                    self._switches = self._read()
                except SwitchesError as error:
                    self._complain(f"{error}; the switches stay as they were")
            return self._switches

    def version(self) -> int:
        """Count how often the file has changed since it was loaded, reading it if it has."""
        self.current()
        return self._version

    def strikes(self, fault: Fault, operation: str, what: str) -> bool:
        """Decide whether a fault strikes, and count it down if it strikes the next N times.

        `what` names the attempt (or the step) that it would strike: the same name is always decided
        the same way.
        """
        switches = self.current()
        settings = switches.operations.get(operation)
        chance = settings.chances.get(fault) if settings is not None else None
        if chance is None:
            return False
        if chance.next is None:
            return _draw(f"{switches.seed}/{self._service}/{operation}/{fault}/{what}") < chance.p
        with self._lock:
            if self._struck[operation, fault] >= chance.next:
                return False
            self._struck[operation, fault] += 1
            return True

    def slow_s(self, operation: str) -> float:
        """Say how long `Fault.SLOW` takes, in seconds."""
        return self.current().operations.get(operation, Operation()).slow_s

    def _read(self) -> Switches:
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return Switches()
        except (OSError, UnicodeDecodeError) as error:
            raise SwitchesError(f"{self._path} cannot be read: {error}") from error
        try:
            document = json.loads(text)
        except ValueError as error:
            raise SwitchesError(f"{self._path} is not JSON: {error}") from error
        try:
            return parse(document, self._service)
        except SwitchesError as error:
            raise SwitchesError(f"{self._path}: {error}") from error


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Tell one version of a file from another; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _draw(what: str) -> float:
    """Draw from [0, 1), the same for the same text: a chance that can be repeated."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
