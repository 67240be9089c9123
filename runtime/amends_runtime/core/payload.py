"""Opaque bytes that amends stores and hands on without ever looking inside."""

from __future__ import annotations

import msgspec

__all__ = ["EMPTY", "Payload"]


class Payload(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Bytes of the caller or of a participant, with what they say they are.

    Never printed: `repr` shows the size only, so that no log, error or golden file can leak one.
    """

    data: bytes = b""
    content_type: str = ""

    def __repr__(self) -> str:
        return f"<{len(self.data)} bytes>"


EMPTY = Payload()
