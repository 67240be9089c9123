"""What the client's methods are given, judged before anything is sent.

A wrong type is a `TypeError`, a value out of range a `ValueError`; both name the argument and what
it must be. Without this a mistake would end in protobuf, whose message names no argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from amends.definition_checks import is_number
from amends.tracing import known_traceparent

MAX_SECONDS: Final = 315_360_000
"""Ten years, the runtime's own limit; longer is a mistake, and gRPC and int64 have limits, too."""
MAX_WHOLE: Final = 2**63 - 1
"""What fits into the contract's int64."""

MAX_ROUND: Final = 2**31 - 1
"""What fits into the contract's int32."""


def checked_text(name: str, value: object) -> str:
    """Give a text that can be sent."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise ValueError(f"{name} holds half a character, which cannot be sent") from None
    return value


def checked_traceparent(value: object) -> str:
    """Give a W3C trace context as version 00 has it, and nothing for a text that is none.

    W3C demands that: what stands in a header from outside must not keep a saga from being started.
    """
    return known_traceparent(checked_text("traceparent", value))


def checked_labels(labels: object) -> dict[str, str]:
    """Give labels that can be sent; None is none."""
    if labels is None:
        return {}
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels must be a mapping of str to str, not {type(labels).__name__}")
    return {
        checked_text("a key of labels", key): checked_text(f"labels[{key!r}]", value)
        for key, value in labels.items()
    }


def checked_seconds(name: str, value: object, *, least: float = 0.001) -> float:
    """Give a duration that is one, before it becomes some surprising number on the wire."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not (is_number(value) and least <= value <= MAX_SECONDS):
        given = value if isinstance(value, float) or abs(value) <= MAX_WHOLE else "a huge int"
        raise ValueError(f"{name} must be {least} to {MAX_SECONDS} seconds, not {given}")
    return value


def checked_round(value: object) -> int:
    """Give the number of a round, from 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"round must be an int, not {type(value).__name__}")
    if not 1 <= value <= MAX_ROUND:
        raise ValueError(f"round must be 1 to {MAX_ROUND}")
    return value


def checked_whole(name: str, value: object) -> int:
    """Give a number or an instant in milliseconds that fits into the contract's field."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value <= MAX_WHOLE:
        raise ValueError(f"{name} must be 0 to {MAX_WHOLE}")
    return value
