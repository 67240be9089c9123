"""What `-o json` and `-o jsonl` print: the SDK's values as JSON, by one rule, so that it is stable.

1. An object has the fields of the SDK's dataclass, under the same names, all of them and always;
   what there is not is null. History records are the exception: each has the fields of its kind.
2. An instant is there twice: `started_at_ms`, UTC milliseconds, and `started_at`, in ISO 8601.
3. A payload is `{"content_type", "size"}`; its content comes with --payloads only, as `json` where
   it is JSON and as `base64` otherwise. What is printed ends up in build logs and chat rooms.
4. With `-o json` a command prints one document. With `-o jsonl` a command that lists or streams
   prints one a line for each thing, as soon as it has it, and any other its one document on a line.
5. Fields may be added later; none changes its meaning.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from amends.definition import Definition
from amends.errors import PayloadError
from amends.payload import EMPTY, Payload, decode
from amends.sagas import Record, RecordKind

__all__ = [
    "document",
    "instant",
    "print_document",
    "print_each",
    "print_list",
    "to_json",
    "to_json_line",
]

INSTANT_ENDINGS = ("_at_ms", "since_ms")
MAX_SHOWN_MS = 253_402_300_799_999  # the last that ISO 8601 can write with four digits of the year


def document(value: object, *, payloads: bool = False) -> Any:
    """The JSON form of a value of the SDK: dicts, lists, strings, numbers, None."""
    match value:
        case Payload():
            return _payload(value, payloads=payloads)
        case Definition():
            return value.to_dict()
        case enum.StrEnum():
            return str(value)
        case Mapping():
            return {str(key): document(each, payloads=payloads) for key, each in value.items()}
        case list() | tuple():
            return [document(each, payloads=payloads) for each in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            pass
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{type(value).__name__} has no JSON form")
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Record):
        always = {"seq", "version", "at_ms", "kind"}
        if value.kind is RecordKind.HEURISTIC_REPORTED:
            always.add("committed")  # false is a fact of it, and so is null: nobody knows
        fields = {
            name: each
            for name, each in fields.items()
            if name in always or each not in (None, "", 0, {})
        }
    found: dict[str, Any] = {}
    for name, each in fields.items():
        found[name] = document(each, payloads=payloads)
        if name == "at_ms" or name.endswith(INSTANT_ENDINGS):
            found[name.removesuffix("_ms")] = None if each is None else instant(each)
    return found


def instant(at_ms: int) -> str:
    """UTC milliseconds in ISO 8601, for example 2026-01-31T23:59:59.999Z."""
    if not 0 <= at_ms <= MAX_SHOWN_MS:
        return f"{at_ms} ms"
    seconds, ms = divmod(at_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{ms:03}Z"


def to_json(value: object) -> str:
    """One JSON document, for a program or a person."""
    return json.dumps(value, ensure_ascii=False, indent=2).translate(_ESCAPED)


def to_json_line(value: object) -> str:
    """One JSON document that is one line, for a program that reads line by line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPED)


# JSON leaves these as they are, and a terminal may take them for commands, a reader for line ends.
_ESCAPED: Final = {code: f"\\u{code:04x}" for code in [*range(0x7F, 0xA0), 0x2028, 0x2029]}


def print_document(value: object, output: str) -> None:
    """Prints one JSON document: on one line if `output` is ``jsonl``."""
    sys.stdout.write((to_json_line(value) if output == "jsonl" else to_json(value)) + "\n")


def print_each(value: object) -> None:
    """Prints one JSON document of several, as a line, at once: its reader may act on it."""
    sys.stdout.write(to_json_line(value) + "\n")
    sys.stdout.flush()


def print_list(name: str, values: Iterable[object], output: str) -> None:
    """Prints values of the SDK: one document with a list of that name, or with ``jsonl`` each."""
    found = (document(value) for value in values)
    if output == "json":
        print_document({name: list(found)}, output)
        return
    for each in found:
        print_each(each)


def _payload(payload: Payload, *, payloads: bool) -> dict[str, Any] | None:
    if payload == EMPTY:
        return None
    found: dict[str, Any] = {"content_type": payload.content_type, "size": len(payload.data)}
    if payloads:
        try:
            value = decode(payload)
        except PayloadError:
            value = payload.data
        if isinstance(value, bytes):
            found["base64"] = base64.b64encode(payload.data).decode("ascii")
        else:
            found["json"] = value
    return found
