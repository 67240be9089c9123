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
content by its bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from amends.errors import PayloadError
from amends.v1 import types_pb2

JSON: Final = "application/json"
OCTET_STREAM: Final = "application/octet-stream"

MAX_PAYLOAD_BYTES: Final = 1024 * 1024
"""The runtime's limit for one payload, checked here so that the author hears of it early."""


@dataclass(frozen=True, slots=True)
class Payload:
    """Opaque bytes and what they are.

    `repr` shows the size and the content type only, so that a payload that ends up in a log line by
    mistake shows nothing.
    """

    data: bytes
    """The bytes; at most 1 MiB."""
    content_type: str = OCTET_STREAM
    """What the bytes are, for example ``application/json``."""

    def __post_init__(self) -> None:
        # Found here, a wrong type names the author's line; found in the encoder it would not.
        parts: tuple[object, object] = (self.data, self.content_type)
        match parts:
            case bytes(), str():
                pass
            case data, content_type:
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

    Raises `PayloadError` for values of other types (also deep inside), for NaN and infinities, and
    for more than `MAX_PAYLOAD_BYTES`.
    """
    match value:
        case Payload():
            payload = value
        case bytes() | bytearray() | memoryview():
            payload = Payload(bytes(value), OCTET_STREAM)
        case _:
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


def _to_json(value: object) -> bytes:
    try:
        return _ENCODER.encode(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        # `from None`: the encoder's own message may quote the value.
        raise PayloadError(
            f"a {type(value).__name__} cannot be encoded as JSON ({type(error).__name__}): use "
            "dict, list, str, int, finite float, bool and None, or pass bytes or a Payload"
        ) from None
