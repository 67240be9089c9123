"""What can go wrong in the runtime, and whose fault it is.

    AmendsError
    ├── Refusal                   the caller's: nothing was stored, nothing happened
    │   ├── InvalidRequest          malformed; carries every violation at once
    │   ├── NotFound                no such saga, definition or participant
    │   ├── AlreadyExists           the id is taken by other content
    │   ├── WrongState              the saga's state does not allow it
    │   └── Overloaded              a limit is reached; carries which, how large, when to retry
    ├── Unavailable               the runtime's: it is starting, stopping or has lost its store
    ├── StoreError                the store's
    │   ├── StoreInUse              another runtime owns it
    │   ├── StoreUnusable           missing, read-only, newer schema, not a database
    │   ├── UnreadableSaga          one saga's history is damaged; the others are not concerned
    │   ├── VersionConflict         a compare-and-set failed: somebody else wrote this saga
    │   ├── OwnershipLost           the epoch moved on: another runtime owns the store now
    │   └── CommitUnknown           a commit failed and may or may not have happened
    ├── ConfigurationError        the operator's: a file, flag or address is wrong
    └── ProgramError              ours: a bug
        ├── IllegalMessage          a message that the saga's state cannot get
        └── IllegalRecord           a record that cannot follow the history

A message says what happened, the state now, what the runtime will do, and what the reader can do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "AlreadyExists",
    "AmendsError",
    "CommitUnknown",
    "ConfigurationError",
    "FieldViolation",
    "IllegalMessage",
    "IllegalRecord",
    "InvalidRequest",
    "NotFound",
    "Overloaded",
    "OwnershipLost",
    "ProgramError",
    "Refusal",
    "StoreError",
    "StoreInUse",
    "StoreUnusable",
    "Unavailable",
    "UnreadableSaga",
    "VersionConflict",
    "WrongState",
]


class AmendsError(Exception):
    """Anything that amends says went wrong."""


class Refusal(AmendsError):
    """The request was refused; nothing was stored and nothing happened.

    `reason` is stable and for programs, `metadata` holds ids, sizes and limits, never payloads.
    """

    def __init__(
        self, reason: str, message: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})


class FieldViolation:
    """One thing that is wrong with a request: the field's path, and what to do about it."""

    __slots__ = ("field", "message")

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        self.message = message

    def __repr__(self) -> str:
        return f"{self.field}: {self.message}"


class InvalidRequest(Refusal):
    """The request is malformed; `violations` names everything that is wrong with it."""

    def __init__(
        self,
        reason: str,
        violations: Sequence[FieldViolation],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason, "; ".join(map(repr, violations)), metadata)
        self.violations = list(violations)


class NotFound(Refusal):
    """There is no such saga, definition or participant."""


class AlreadyExists(Refusal):
    """The id is taken by something with other content."""


class WrongState(Refusal):
    """The state does not allow it, and waiting alone will not change that."""


class Overloaded(Refusal):
    """A limit is reached. Nothing was done; try again after `retry_after_ms`."""

    def __init__(
        self,
        reason: str,
        message: str,
        retry_after_ms: int,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason, message, metadata)
        self.retry_after_ms = retry_after_ms


class Unavailable(AmendsError):
    """The runtime cannot answer now: it is starting, stopping, or has lost its store.

    Where a write was under way its outcome is unknown; asking again with the same id is safe.
    """


class StoreError(AmendsError):
    """The store failed."""


class StoreInUse(StoreError):
    """Another runtime owns this store."""


class StoreUnusable(StoreError):
    """The store cannot be opened: missing, read-only, of a newer schema, or not a database."""


class UnreadableSaga(StoreError):
    """One saga's history cannot be read: it is damaged, or a newer program wrote it."""


class VersionConflict(StoreError):
    """A compare-and-set failed for these sagas: their history has moved on. Nothing was written."""

    def __init__(self, saga_nos: Sequence[int]) -> None:
        super().__init__(f"the history has moved on for sagas no. {', '.join(map(str, saga_nos))}")
        self.saga_nos = tuple(saga_nos)


class OwnershipLost(StoreError):
    """The store's epoch has moved on: another runtime owns it now. This one must stop."""


class CommitUnknown(StoreError):
    """A commit failed and may or may not have happened.

    Reopen the store and read before going on.
    """


class ConfigurationError(AmendsError):
    """A configuration file, flag, environment variable or address is wrong."""


class ProgramError(AmendsError):
    """A bug in amends."""


class IllegalMessage(ProgramError):
    """A message reached a saga whose state cannot get it."""

    def __init__(self, saga_id: str, state: str, message: str) -> None:
        super().__init__(f"saga {saga_id} in state {state} cannot get {message}")


class IllegalRecord(ProgramError):
    """A record does not follow the history."""

    def __init__(self, saga_id: str, state: str, record: str) -> None:
        super().__init__(f"saga {saga_id} in state {state} cannot be followed by {record}")
