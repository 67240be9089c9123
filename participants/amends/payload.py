"""Payloads: opaque bytes with a content type, and the way between them and Python values.

amends carries payloads and never looks inside. This module is the one place of the SDK that turns
values into payloads and back; both sides of the wire use it.

===========================================  ============================  =======================
value                                        content type                  bytes
===========================================  ============================  =======================
``dict list tuple str int float bool None``  ``application/json``          JSON, UTF-8, keys sorted
``bytes bytearray memoryview``               ``application/octet-stream``  as they are
`Payload`                                    its own                       its own
===========================================  ============================  =======================

Keys are sorted so that equal values are equal bytes: an idempotent start and the barrier compare
content by its bytes. They must be ``str``: JSON has no others, and ``{1: 2}`` would come back as
``{"1": 2}``.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Final

from amends.errors import PayloadError
from amends.v1 import types_pb2

JSON: Final = "application/json"
OCTET_STREAM: Final = "application/octet-stream"

MAX_PAYLOAD_BYTES: Final = 1024 * 1024
"""The runtime's limit for one payload, checked here so that the author hears of it early."""

MAX_CONTENT_TYPE_BYTES: Final = 256
"""The runtime's limit for a content type; a result with a longer one would never be an outcome."""


@dataclass(frozen=True, slots=True)
class Payload:
    """Opaque bytes and what they are.

    `repr` shows the size and the content type only, so that a payload that ends up in a log line by
    mistake shows nothing.
    """

    data: bytes
    """The bytes; at most 1 MiB."""
    content_type: str = OCTET_STREAM
    """What the bytes are, for example ``application/json``; at most 256 bytes."""

    def __post_init__(self) -> None:
        # Found here, a wrong type names the author's line; found in the encoder it would not.
        data: object = self.data
        content_type: object = self.content_type
        if not isinstance(data, bytes) or not isinstance(content_type, str):
            raise PayloadError(
                "a Payload is made of bytes and a str, not of "
                f"{type(data).__name__} and {type(content_type).__name__}"
            )

    def __repr__(self) -> str:
        return f"<Payload {len(self.data)} bytes {self.content_type or 'without content type'}>"

    def json(self) -> Any:
        """Give the JSON value; an empty payload is ``None``.

        Raises `PayloadError` if the bytes are not JSON. The content type is not asked: many a
        sender forgets it.
        """
        if not self.data:
            return None
        try:
            return json.loads(self.data)
        except ValueError as error:
            # `from None`: the decoder's own message quotes the document.
            raise PayloadError(
                f"{self!r} is not JSON ({type(error).__name__}); ask its sender, or read `.data`"
            ) from None


# Made once: json.dumps makes one for every call that is not plain.
_ENCODER: Final = json.JSONEncoder(
    allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=True
)

EMPTY: Final = Payload(b"", "")
"""No payload at all."""


def encode(value: object) -> Payload:
    """Make a payload of `value`, by the table above.

    Raises `PayloadError` for values of other types and for keys that are not ``str`` (also deep
    inside), for NaN and infinities, for more than `MAX_PAYLOAD_BYTES`, and for a content type that
    is longer than `MAX_CONTENT_TYPE_BYTES` or no text.
    """
    if isinstance(value, Payload):
        _check_content_type(value.content_type)
        payload = value
    elif isinstance(value, bytes | bytearray | memoryview):
        payload = Payload(bytes(value), OCTET_STREAM)
    else:
        payload = Payload(_to_json(value), JSON)
    if len(payload.data) > MAX_PAYLOAD_BYTES:
        raise PayloadError(
            f"a payload has {len(payload.data)} bytes, the limit is {MAX_PAYLOAD_BYTES}: "
            "store the data elsewhere and send a reference to it"
        )
    return payload


def decode(payload: Payload) -> Any:
    """Give the value: JSON parsed, nothing at all as ``None``, everything else as bytes.

    Raises `PayloadError` if the content type says JSON and the bytes are not.
    """
    if payload == EMPTY:
        return None
    if _is_json(payload.content_type):
        return payload.json()
    return payload.data


def to_wire(payload: Payload) -> types_pb2.Payload:
    """Give the message of the contract."""
    return types_pb2.Payload(data=payload.data, content_type=payload.content_type)


def from_wire(message: types_pb2.Payload) -> Payload:
    """Give the payload that a message of the contract carries; an absent one is `EMPTY`."""
    return Payload(message.data, message.content_type)


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == JSON or media_type.endswith("+json")


def _check_content_type(content_type: str) -> None:
    """Raise `PayloadError` for what no message can carry; the content type itself is not shown."""
    if not _is_encodable(content_type):
        raise PayloadError(
            "the content type of a payload has half a character in it (a name of a file that is "
            "not UTF-8?): write it in ASCII, for example application/pdf"
        )
    size = len(content_type.encode())
    if size > MAX_CONTENT_TYPE_BYTES:
        raise PayloadError(
            f"the content type of a payload has {size} bytes, the limit is "
            f"{MAX_CONTENT_TYPE_BYTES}: give the media type alone, for example application/pdf"
        )


def _to_json(value: object) -> bytes:
    try:
        encoded = _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        # `from None`: the encoder's own message may quote the value.
        raise _not_json(value, type(error).__name__) from None
    if not _has_text_keys(value):
        raise _not_json(value, "a key that is no str")
    return encoded


_CONTAINERS: Final = (dict, list, tuple)


def _has_text_keys(value: object) -> bool:
    """Look through what the encoder took, which is finite: it writes other keys as text."""
    containers: list[Any] = [value] if isinstance(value, _CONTAINERS) else []
    while containers:
        inner = containers.pop()
        if isinstance(inner, dict):
            for key in inner:  # a plain loop: this is on the way of every start and result
                if not isinstance(key, str):
                    return False
            inner = inner.values()
        containers += [one for one in inner if isinstance(one, _CONTAINERS)]
    return True


def _not_json(value: object, otherwise: str) -> PayloadError:
    """Say what has no JSON and where; what only the encoder knows is said as `otherwise`."""
    subject = _scalar_obstacle(value)
    found = ""
    if subject is None:
        subject = f"an object of type {type(value).__name__}"
        try:
            found = f": {_obstacle(value, '', ()) or otherwise}"
        except RecursionError:
            found = ": too many levels"
    return PayloadError(
        f"{subject} cannot be encoded as JSON{found}; use dict with str keys, list, str, int, "
        "finite float, bool and None, or pass bytes or a Payload"
    )


_FIELD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
"""Keys that errors show, as names of fields; others may be values, and are counted."""


def _obstacle(value: object, path: str, around: tuple[int, ...]) -> str | None:
    """Find the first thing that has no JSON, by its type and its path, which show no value."""
    at = f" at {path}" if path else ""
    scalar = _scalar_obstacle(value)
    if scalar is not None:
        return scalar + at
    if not isinstance(value, dict | list | tuple):
        return None
    if id(value) in around:
        return f"something in itself{at}"
    around = (*around, id(value))
    if not isinstance(value, dict):
        found = (_obstacle(one, f"{path}[{n}]", around) for n, one in enumerate(value))
        return next(filter(None, found), None)
    for key in value:
        if not isinstance(key, str):
            return f"a key of type {type(key).__name__}{at}"
        what = _scalar_obstacle(key)
        if what is not None:
            return f"a key that is {what}{at}"
    for number, (key, one) in enumerate(value.items(), 1):
        step = f'["{key}"]' if _FIELD.fullmatch(key) else f"[key {number}]"
        inner = _obstacle(one, path + step, around)
        if inner is not None:
            return inner
    return None


def _scalar_obstacle(value: object) -> str | None:
    """Say why something that holds nothing else has no JSON."""
    match value:
        case str():
            return None if _is_encodable(value) else "text with half a character"
        case float():
            return None if math.isfinite(value) else "NaN or an infinity"
        case int():
            return None if _has_digits(value) else "an int of too many digits"
        case None | dict() | list() | tuple():
            return None
        case _:
            return f"an object of type {type(value).__name__}"


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _has_digits(number: int) -> bool:
    try:
        int.__repr__(number)
    except ValueError:  # beyond sys.set_int_max_str_digits
        return False
    return True
