"""Payloads, and what makes a repeated start the same start."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

import msgspec

from amends.v1 import types_pb2
from amends_runtime.core.payload import Payload

__all__ = [
    "MAX_CONTENT_TYPE_BYTES",
    "MAX_PAYLOAD_BYTES",
    "payload_from_proto",
    "payload_to_proto",
    "put_payload",
    "start_content_hash",
]

MAX_PAYLOAD_BYTES: Final = 1024 * 1024
"""One payload. Three of them, with all that a call says besides, fit gRPC's 4 MiB message."""
MAX_CONTENT_TYPE_BYTES: Final = 256
"""A content type with parameters; a payload's bytes must not hide where no limit looks."""


def payload_to_proto(payload: Payload) -> types_pb2.Payload:
    """The message of the contract."""
    return types_pb2.Payload(data=payload.data, content_type=payload.content_type)


def payload_from_proto(message: types_pb2.Payload) -> Payload:
    """The payload that a message carries; an absent one is empty."""
    return Payload(message.data, message.content_type)


def put_payload(message: types_pb2.Payload, payload: Payload) -> None:
    """Fills in a message where it lies, which is quicker than making one and copying it."""
    message.data = payload.data
    message.content_type = payload.content_type


def start_content_hash(
    definition_name: str,
    definition_hash: str,
    input_: Payload,
    labels: Mapping[str, str],
    deadline_ms: int,
) -> str:
    """SHA-256, in lower-case hex, of all that makes a repeated start the same start.

    `definition_hash` is the one that the caller named, empty if none: a repeat after a new version
    was registered is still the same start. How long the caller waits and its trace context are no
    content. msgpack writes each value's length before it, so no two contents run into each other.
    """
    content = (
        "amends.start.1",
        definition_name,
        definition_hash,
        input_.data,
        input_.content_type,
        sorted(labels.items()),
        deadline_ms,
    )
    return hashlib.sha256(msgspec.msgpack.encode(content)).hexdigest()
