"""Which sagas a command is about: the filters that `list` and `watch` share."""

from __future__ import annotations

import enum
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final, TypedDict

from cyclopts import Group, Parameter

from amends_runtime.cli import candidates
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.options import Labels, parse_pairs

if TYPE_CHECKING:
    from amends.sagas import SagaState

__all__ = ["ALL", "Filters", "Matching", "duration_ms", "instant_ms"]

FILTERS: Final = Group("Filters", sort_key=10)


class StateName(enum.StrEnum):
    """The states of `amends.SagaState`, which help must not wait for."""

    RUNNING = "RUNNING"
    COMPENSATING = "COMPENSATING"
    STUCK = "STUCK"
    COMPLETED = "COMPLETED"
    COMPENSATED = "COMPENSATED"
    ABANDONED = "ABANDONED"
    MIXED = "MIXED"


class Matching(TypedDict):
    """The filters as the SDK's client takes them, in `list` and in `watch`."""

    state: list[SagaState] | None
    definition: str | None
    labels: dict[str, str] | None
    started_from_ms: int | None
    started_before_ms: int | None


@Parameter(name="*", group=FILTERS)
@dataclass(frozen=True)
class Filters:
    """Only sagas for which all of these hold."""

    state: Annotated[
        tuple[StateName, ...],
        Parameter(
            name="--state",
            name_transform=str.upper,  # any case, as people type it
            negative="",
            show_default=False,
            consume_multiple=False,
        ),
    ] = ()
    """Only those in this state; may be repeated."""

    definition: Annotated[str | None, Parameter(completer=candidates.definitions)] = None
    """Only those of this definition."""

    label: Labels = ()
    """Only those with this label, KEY=VALUE; may be repeated, then all must match."""

    started_from: str | None = None
    """Only those started since this: 2026-01-31, 2026-01-31T10:00Z, or 90s, 15m, 2h, 3d ago."""

    started_before: str | None = None
    """Only those started before this, which is written like --started-from."""

    def matching(self) -> Matching:
        """The filters, read. Ends the command if one cannot be."""
        from amends.sagas import SagaState  # noqa: PLC0415  # heavy, and of no use to help

        since = _instant_or_none(self.started_from, "--started-from")
        before = _instant_or_none(self.started_before, "--started-before")
        if since is not None and before is not None and before <= since:
            raise Exit(
                ExitCode.USAGE,
                f"--started-before {self.started_before}: is not after --started-from "
                f"{self.started_from}: no saga can match",
            )
        return {
            "state": [SagaState(name) for name in self.state] or None,
            "definition": self.definition,
            "labels": parse_pairs(self.label, "--label", "KEY=VALUE") or None,
            "started_from_ms": since,
            "started_before_ms": before,
        }


ALL: Final = Filters()


def _instant_or_none(given: str | None, flag: str) -> int | None:
    return None if given is None else instant_ms(given, flag, now_ms=time.time_ns() // 1_000_000)


def instant_ms(given: str, flag: str, *, now_ms: int) -> int:
    """An instant that a person wrote, in UTC milliseconds. Ends the command if it is none.

    It is a date, a date with a time (UTC where no zone is named), or how long ago it was.
    """
    ago = AGO.fullmatch(given)
    try:
        if ago is not None:
            found = now_ms - round(float(ago[1]) * UNITS_MS[ago[2]])
        else:
            read = datetime.fromisoformat(given)
            # A time without a zone is UTC, as everything that amends prints is.
            read = read.replace(tzinfo=UTC) if read.tzinfo is None else read
            found = round(read.timestamp() * 1000)
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise Exit(
            ExitCode.USAGE,
            f"{flag} {given}: is no instant after 1970: write 2026-01-31, 2026-01-31T10:00Z, or "
            "how long ago, as in 90s, 15m, 2h, 3d",
        )
    return found


def duration_ms(given: str, flag: str) -> int:
    """A duration that a person wrote, in milliseconds. Ends the command if it is none."""
    found = AGO.fullmatch(given)
    if found is None:
        raise Exit(
            ExitCode.USAGE,
            f"{flag} {given}: is no duration: write a number and its unit, as in 30s, 15m, 2h, 3d",
        )
    return round(float(found[1]) * UNITS_MS[found[2]])


AGO: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(s|m|h|d)")
UNITS_MS: Final = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
