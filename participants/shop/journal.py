"""What a client asked for and what it was told: one side of the audit.

One JSON object a line, appended as things happen and never changed, so that a journal says the
truth up to the moment at which its writer was killed::

    {"event": "starting", "saga_id": …, "at_ms": …, "input": {…}}   before the call
    {"event": "acknowledged", "saga_id": …, "at_ms": …}             StartSaga answered
    {"event": "refused", "saga_id": …, "at_ms": …}                  definitely not started
    {"event": "ended", "saga_id": …, "at_ms": …, "state": …}        the client was told the end

A start with neither of the middle two has an outcome that nobody knows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass(slots=True)
class Entry:
    """What the journal says of one saga."""

    input: Mapping[str, Any]
    acknowledged_at_ms: int = 0
    """When the client learned that it was started; 0: it never did."""
    is_refused: bool = False
    ends: list[str] = field(default_factory=list)
    """The end states that the client was told; one, told several times or not, is right."""


class Journal:
    """Writes a journal."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def starting(self, saga_id: str, order: Mapping[str, Any]) -> None:
        """Write down a start; do so before the call, or an effect may have no cause."""
        self._write("starting", saga_id, input=order)

    def acknowledged(self, saga_id: str) -> None:
        """Write down that the start was acknowledged: from now on it may not be lost."""
        self._write("acknowledged", saga_id)

    def refused(self, saga_id: str) -> None:
        """Write down that the saga was definitely not started."""
        self._write("refused", saga_id)

    def ended(self, saga_id: str, state: str) -> None:
        """Write down the end that the client was told."""
        self._write("ended", saga_id, state=state)

    def _write(self, event: str, saga_id: str, **more: object) -> None:
        line = {"event": event, "saga_id": saga_id, "at_ms": time.time_ns() // 1_000_000, **more}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()  # into the kernel, which outlives this process


def read_journal(path: Path) -> dict[str, Entry]:
    """Read a journal, by saga. Raises `ValueError` for one that contradicts itself.

    A last line that a kill has cut off is left out.
    """
    entries: dict[str, Entry] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is cut off
        event = json.loads(line)
        saga_id = event["saga_id"]
        if event["event"] == "starting":
            # A client that repeats a start it knows nothing of does so with the same input.
            entry = entries.setdefault(saga_id, Entry(event["input"]))
            if entry.input != event["input"]:
                raise ValueError(f"{path}:{number}: saga {saga_id} was started with other input")
            continue
        if saga_id not in entries:
            raise ValueError(f"{path}:{number}: saga {saga_id} was never started")
        entry = entries[saga_id]
        match event["event"]:
            case "acknowledged":
                entry.acknowledged_at_ms = entry.acknowledged_at_ms or event["at_ms"]
            case "refused":
                entry.is_refused = True
            case "ended":
                entry.ends.append(event["state"])
            case other:
                raise ValueError(f"{path}:{number}: there is no event {other!r}")
    return entries
