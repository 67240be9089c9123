"""Rows to structs and back: the only place that knows how things look on disk.

Records are stored as MessagePack, one row per turn, each row with the number of its format. A row
of an older format is lifted one version at a time: `UPCASTS[n]` takes the plain values of format `n
+ 1` (a turn is a list of records, a record a list of its tag and fields) and gives those of format
`n + 2`. So the newest types are the only ones that the rest of the program knows, and a database of
any age opens.

To change a record's shape: append a function to `UPCASTS`, and a stored turn of the old shape to
its test. New kinds of records are a new format, too, so that an older program says that it is too
old instead of that the database is damaged; the function is `new_kinds`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from amends_runtime.core.definition import Definition
from amends_runtime.core.records import Record
from amends_runtime.errors import StoreError, UnreadableSaga

__all__ = [
    "RECORDS",
    "UPCASTS",
    "RecordCodec",
    "Upcast",
    "decode_definition",
    "decode_labels",
    "encode_definition",
    "encode_labels",
    "new_kinds",
]

Upcast = Callable[[list[Any]], list[Any]]


def _probe(turn: list[Any]) -> list[Any]:
    """Format 1 to 2: a failed attempt says whether it was a probe, which none was."""
    attempt_failed = 6
    return [[*record, False] if record[0] == attempt_failed else record for record in turn]


def _timing_in_full(turn: list[Any]) -> list[Any]:
    """Format 2 to 3: timings tell what held the attempt, and microseconds; none were kept."""
    executed, rejected, compensated, attempt_failed = 3, 4, 5, 6
    place = {executed: 5, rejected: 5, compensated: 5, attempt_failed: 6}
    for record in turn:
        if record[0] in place:
            record[place[record[0]]] += [0, 0, 0]
    return turn


def new_kinds(turn: list[Any]) -> list[Any]:
    """A format that only has more kinds of records: what the one before it wrote is valid in it."""
    return turn


# 3 to 4: two-phase commits; and a result that is left out says why, which none was before.
UPCASTS: tuple[Upcast, ...] = (_probe, _timing_in_full, new_kinds)


class RecordCodec:
    """A turn's records to bytes and back.

    `format` is what `encode` writes: one more than there are upcasts. `decode` reads it and
    everything older.
    """

    def __init__(self, upcasts: Sequence[Upcast] = UPCASTS) -> None:
        self.format = len(upcasts) + 1
        self._upcasts = tuple(upcasts)
        changes = [number for number, one in enumerate(upcasts, start=2) if one is not new_kinds]
        self._read_as_they_are = max(changes, default=1)  # formats from here on
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(tuple[Record, ...])

    def encode(self, records: Sequence[Record]) -> bytes:
        """The bytes of one turn, in the newest format."""
        return self._encoder.encode(records)

    def append(self, records: Sequence[Record], buffer: bytearray) -> None:
        """Puts the same bytes at the buffer's end."""
        self._encoder.encode_into(records, buffer, -1)

    def decode(
        self, row_format: int, data: bytes, saga: str | int, version: int
    ) -> tuple[Record, ...]:
        """The records of one stored turn. `saga` and `version` say in an error which one it was.

        Raises UnreadableSaga where the bytes cannot be read, or are of a format that a newer
        program wrote.
        """
        try:
            if self._read_as_they_are <= row_format <= self.format:
                return self._decoder.decode(data)
            if not 1 <= row_format < self.format:
                raise UnreadableSaga(
                    f"saga {saga}, version {version}: its records are of format {row_format}, and"
                    f" this program knows formats 1 to {self.format}: run the amends that wrote it"
                )
            plain = msgspec.msgpack.decode(data)
            for upcast in self._upcasts[row_format - 1 :]:
                plain = upcast(plain)
            return msgspec.convert(plain, tuple[Record, ...])
        except UnreadableSaga:
            raise
        except Exception as error:  # noqa: BLE001  # an upcast may raise anything at damaged bytes
            # The cause is named by its kind only: its text could quote a payload.
            raise UnreadableSaga(
                f"saga {saga}, version {version}: its records (format {row_format}, {len(data)}"
                f" bytes) cannot be read ({type(error).__name__}): the database is damaged,"
                " restore a backup"
            ) from None


RECORDS = RecordCodec()


def encode_definition(definition: Definition) -> bytes:
    """A normalised definition as JSON, every field written out, those with their default too."""
    plain = msgspec.structs.asdict(definition)
    plain["steps"] = [
        {
            **msgspec.structs.asdict(step),
            "retry": step.retry and msgspec.structs.asdict(step.retry),
            "compensation_retry": step.compensation_retry
            and msgspec.structs.asdict(step.compensation_retry),
        }
        for step in definition.steps
    ]
    return msgspec.json.encode(plain)


def decode_definition(content_hash: str, data: bytes) -> Definition:
    """The definition of a stored row. Raises StoreError where it cannot be read."""
    try:
        return msgspec.json.decode(data, type=Definition)
    except msgspec.MsgspecError as error:
        raise StoreError(
            f"definition {content_hash} cannot be read: {error}:"
            " the database is damaged, restore a backup"
        ) from error


def encode_labels(labels: dict[str, str]) -> str:
    """Labels as JSON, empty where there are none."""
    return msgspec.json.encode(labels).decode() if labels else ""


def decode_labels(text: str | None) -> dict[str, str]:
    """The labels of a stored row, which has NULL where there are none."""
    return msgspec.json.decode(text, type=dict[str, str]) if text else {}
