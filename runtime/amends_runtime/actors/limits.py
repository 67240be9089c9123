"""The bounds of what a runtime holds in memory."""

from __future__ import annotations

import msgspec

__all__ = ["Limits"]


class Limits(msgspec.Struct, frozen=True):
    """Bounds of what is held in memory."""

    live_sagas: int = 100_000  # about 5 KB each; what exists may be a quarter more: see `leaving`
    park_after_ms: int = 10_000  # nearer wake-ups cost less than leaving and coming back
    mailbox: int = 1_024  # far more than a sane client sends to one saga
    commit_batch: int = 512  # transitions in one commit: beyond it the sync is no longer what costs
    commit_queue: int = 10_000  # about a second of work; more only makes everybody wait longer
