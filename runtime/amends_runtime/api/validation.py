"""What a request may say. All that is wrong with one is found before anything is done with it.

    checks = Checks()
    saga_id = checks.saga_id("saga_id", request.saga_id)
    ...
    checks.passed()             raises InvalidRequest with every violation

A check answers with the value to go on with; after a violation that is anything of the right type.
What is out of range is refused if it can only be a mistake (a negative time), and taken for the
bound where the bound is what the caller wants (a wait or a page larger than the largest).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from amends.v1 import operator_pb2, saga_pb2, types_pb2
from amends_runtime import wire
from amends_runtime.api.paging import BadPageToken, Question, token_from
from amends_runtime.api.resuming import BadResumeToken, Position, position_from
from amends_runtime.core.addresses import check_address, check_participant_name
from amends_runtime.core.definition import DEFINITION_NAME, MAX_DURATION_MS, STEP_NAME
from amends_runtime.core.payload import Payload
from amends_runtime.core.records import SagaState
from amends_runtime.core.tracing import TRACEPARENT
from amends_runtime.errors import FieldViolation, InvalidRequest
from amends_runtime.ports import SagaFilter, StoreIdentity

__all__ = ["MAX_AUTHOR_BYTES", "MAX_REASON_BYTES", "Checks", "is_saga_id"]

MAX_SAGA_ID_BYTES: Final = 128
"""Room for a UUID with a prefix. It stands in every key, log line and span."""
MAX_CHILD_ID_BYTES: Final = MAX_SAGA_ID_BYTES + 4 * (1 + 48)
"""Four levels of `/step` below a saga's own id."""
MAX_LABELS: Final = 16
"""Labels are for filters; data belongs into the input."""
MAX_LABEL_VALUE_BYTES: Final = 256
"""A page of 1,000 sagas with all of their labels must stay a reasonable message."""
MAX_AUTHOR_BYTES: Final = 256
"""A person or a program."""
MAX_REASON_BYTES: Final = 1024
"""A few sentences; it lands in the history."""
MAX_REQUEST_ID_BYTES: Final = 128
"""Room for a UUID with a prefix. It is kept for as long as what it did."""
MAX_STORE_ID_BYTES: Final = 128
"""Of a store or an incarnation; ours are UUIDs, another runtime's are its own affair."""
MAX_SHOWN_CHARS: Final = 64
"""Of a wrong value: enough to recognise it."""

NEW_SAGA_ID: Final = re.compile(rf"[A-Za-z0-9._:-]{{0,{MAX_SAGA_ID_BYTES}}}")
ANY_SAGA_ID: Final = re.compile(r"[A-Za-z0-9._:/-]+")
LABEL_KEY: Final = re.compile(r"[a-z][a-z0-9_.-]{0,62}")
CONTENT_TYPE: Final = re.compile(rf"[ -~]{{0,{wire.MAX_CONTENT_TYPE_BYTES}}}")
CONTENT_HASH: Final = re.compile(r"[0-9a-f]{64}")


def is_saga_id(value: str) -> bool:
    """Whether there can be a saga of this id, children included."""
    return len(value) <= MAX_CHILD_ID_BYTES and ANY_SAGA_ID.fullmatch(value) is not None


class Checks:
    """Collects what is wrong with one request, or with the item `number` of its list `of`."""

    __slots__ = ("_found", "_number", "_of")

    def __init__(self, of: str = "", number: int = 0) -> None:
        self._of = of
        self._number = number
        self._found: list[FieldViolation] = []

    def refuse(self, field: str, message: str) -> None:
        """Adds a violation."""
        path = f"{self._of}[{self._number}].{field}" if self._of else field
        self._found.append(FieldViolation(path, message))

    def passed(self) -> None:
        """Raises InvalidRequest with everything that was found; returns if nothing was."""
        if self._found:
            raise InvalidRequest("INVALID_REQUEST", self._found)

    # -- names ---------------------------------------------------------------------------------

    def new_saga_id(self, field: str, value: str) -> str:
        """An id that a caller gives; empty is none."""
        if NEW_SAGA_ID.fullmatch(value):
            return value
        size = len(value.encode())
        if size > MAX_SAGA_ID_BYTES:
            self.refuse(
                field, f"{size} bytes, and {MAX_SAGA_ID_BYTES} are the most: use a shorter id"
            )
        elif "/" in value:
            self.refuse(
                field,
                f"{_shown(value)} has a '/', which is reserved for child sagas: use ':' or '.'",
            )
        else:
            self.refuse(field, f"{_shown(value)} is not a saga id: use A-Z a-z 0-9 . _ : -")
        return value

    def saga_id(self, field: str, value: str) -> str:
        """The id of a saga that is there, or of a child."""
        size = len(value.encode())
        if not value:
            self.refuse(field, "it is missing: say which saga")
        elif size > MAX_CHILD_ID_BYTES:
            self.refuse(field, f"{size} bytes, and no saga's id has more than {MAX_CHILD_ID_BYTES}")
        elif not ANY_SAGA_ID.fullmatch(value):
            self.refuse(
                field, f"{_shown(value)} is not a saga id: those are of A-Z a-z 0-9 . _ : - /"
            )
        return value

    def definition_name(self, field: str, value: str) -> str:
        """The name of a definition."""
        if not value:
            self.refuse(field, "it is missing: name a registered definition")
        elif not DEFINITION_NAME.fullmatch(value):
            self.refuse(
                field,
                f"{_shown(value)} is not a definition name: those are a lower-case letter,"
                " then up to 63 of a-z 0-9 _ -",
            )
        return value

    def content_hash(self, field: str, value: str) -> str:
        """The content hash of a definition; empty is the latest."""
        if value and not CONTENT_HASH.fullmatch(value):
            self.refuse(
                field,
                f"{_shown(value)} is not a content hash: those are 64 of 0-9 a-f, as registration"
                " answered; leave it out for the latest version",
            )
        return value

    def traceparent(self, field: str, value: str) -> str:
        """A W3C trace context; empty is none. One of the metadata is not checked but left alone."""
        if value and not TRACEPARENT.fullmatch(value):
            self.refuse(
                field,
                f"{_shown(value)} is not a traceparent: write 00-TRACE-SPAN-FLAGS with 32, 16 and 2"
                " of 0-9 a-f, the first two of them not all 0, or leave it out",
            )
        return value

    def text(self, field: str, value: str, max_bytes: int) -> str:
        """Words of a person."""
        size = len(value.encode())
        if size > max_bytes:
            self.refuse(field, f"{size} bytes, and {max_bytes} are the most: say it shorter")
        return value

    def audit(self, field: str, message: operator_pb2.Audit) -> tuple[str, str, str]:
        """Who does something by hand, and why: both are asked for. And the request's own id."""
        author = self.text(f"{field}.author", message.author, MAX_AUTHOR_BYTES)
        reason = self.text(f"{field}.reason", message.reason, MAX_REASON_BYTES)
        if not author.strip():
            self.refuse(f"{field}.author", "it is missing: say who does it, it is written down")
        if not reason.strip():
            self.refuse(f"{field}.reason", "it is missing: say why, it is written down")
        size = len(message.request_id.encode())
        if size > MAX_REQUEST_ID_BYTES:
            self.refuse(
                f"{field}.request_id",
                f"{size} bytes, and {MAX_REQUEST_ID_BYTES} are the most: use a UUID",
            )
        return author, reason, message.request_id

    def step_name(self, field: str, value: str) -> str | None:
        """The name of a step; empty is none. What the definition has is looked up elsewhere."""
        if value and not STEP_NAME.fullmatch(value):
            self.refuse(
                field,
                f"{_shown(value)} is not a step's name: those are a lower-case letter, then up to"
                " 47 of a-z 0-9 _ -",
            )
        return value or None

    def round(self, field: str, value: int) -> int:
        """A round that was prepared."""
        if value < 1:
            self.refuse(field, f"{value} is no round: send that of the call of Prepare, from 1")
        return value

    def of_prepare(self, field: str, value: str) -> str:
        """A store's id or incarnation, as the call of Prepare brought it, whosever it is."""
        if not value:
            self.refuse(field, "it is missing: send that of the call of Prepare")
        return self._id_of_store(field, value)

    def incarnation(self, field: str, value: str) -> str:
        """The incarnation of a store."""
        if not value:
            self.refuse(field, "it is missing: send the one that GetRuntime shows")
        return self._id_of_store(field, value)

    def _id_of_store(self, field: str, value: str) -> str:
        size = len(value.encode())
        if size > MAX_STORE_ID_BYTES:
            self.refuse(field, f"{size} bytes, and {MAX_STORE_ID_BYTES} are the most: it is a UUID")
        return value

    def participant_name(self, field: str, value: str) -> str:
        """The name of a participant."""
        if not value:
            self.refuse(field, "it is missing: say which participant")
            return value
        try:
            return check_participant_name(value)
        except ValueError as wrong:
            self.refuse(field, f"{_shown(value)} {wrong}")
            return value

    def address(self, field: str, value: str) -> str:
        """Where a participant is called."""
        try:
            return check_address(value)
        except ValueError as wrong:
            self.refuse(field, f"it {wrong}")
            return value

    # -- numbers -------------------------------------------------------------------------------

    def duration_ms(self, field: str, value: int) -> int:
        """A duration; 0 is the default."""
        if not 0 <= value <= MAX_DURATION_MS:
            self.refuse(
                field,
                f"{value} is out of range: 0 (the default) to {MAX_DURATION_MS} ms (ten years)",
            )
        return value

    def wait_ms(self, field: str, value: int, max_ms: int) -> int:
        """How long to hold a reply; more than the bound is the bound."""
        if value < 0:
            self.refuse(field, f"{value} is negative: give 0 to {max_ms} ms")
        return min(value, max_ms)

    def instant_ms(self, field: str, value: int) -> int:
        """An instant; 0 is none."""
        if value < 0:
            self.refuse(
                field, f"{value} is negative: give UTC milliseconds since 1970, or 0 for none"
            )
        return value

    def page_size(self, field: str, value: int, default: int, most: int) -> int:
        """How many items; 0 is the default, more than the most is the most."""
        if value < 0:
            self.refuse(field, f"{value} is negative: give 1 to {most}, or 0 for {default}")
        return min(value or default, most)

    def page_token(self, field: str, asked: Question, token: str) -> int | None:
        """Where a page begins; None is at the beginning."""
        if not token:
            return None
        try:
            return token_from(asked, token)
        except BadPageToken as bad:
            self.refuse(field, str(bad))
            return None

    def resume_token(self, field: str, token: str, identity: StoreIdentity) -> Position | None:
        """Where a watch goes on; None is from now."""
        if not token:
            return None
        try:
            return position_from(identity, token)
        except BadResumeToken as bad:
            self.refuse(field, str(bad))
            return None

    # -- contents ------------------------------------------------------------------------------

    def payload(self, field: str, message: types_pb2.Payload, max_bytes: int) -> Payload:
        """Opaque bytes: only their number is anybody's business."""
        payload = wire.payload_from_proto(message)
        size = len(payload.data)
        if size > max_bytes:
            self.refuse(
                f"{field}.data",
                f"{size} bytes, and {max_bytes} are the most: store the data elsewhere and pass a"
                " reference, or raise payload_bytes under [limits]",
            )
        if not CONTENT_TYPE.fullmatch(payload.content_type):
            self._refuse_content_type(f"{field}.content_type", payload.content_type)
        return payload

    def _refuse_content_type(self, field: str, value: str) -> None:
        size = len(value.encode())
        if size > wire.MAX_CONTENT_TYPE_BYTES:
            self.refuse(field, f"{size} bytes, and {wire.MAX_CONTENT_TYPE_BYTES} are the most")
        else:
            self.refuse(
                field,
                f"{_shown(value)} is not a content type: use printable ASCII, as in"
                " application/json, or leave it out",
            )

    def labels(self, field: str, labels: Mapping[str, str]) -> dict[str, str]:
        """A caller's labels."""
        if not labels:
            return {}
        if len(labels) > MAX_LABELS:
            self.refuse(
                field,
                f"{len(labels)} labels, and {MAX_LABELS} are the most: put data into the input",
            )
            return {}
        for key, value in sorted(labels.items()):
            if not LABEL_KEY.fullmatch(key):
                self.refuse(
                    f"{field}[{_shown(key)}]",
                    "it is not a label's key: use a lower-case letter, then up to 62 of"
                    " a-z 0-9 _ . -",
                )
            size = len(value.encode())
            if size > MAX_LABEL_VALUE_BYTES:
                self.refuse(
                    f"{field}[{_shown(key)}]",
                    f"its value has {size} bytes, and {MAX_LABEL_VALUE_BYTES} are the most",
                )
        return dict(labels)

    def filter(self, field: str, message: saga_pb2.SagaFilter) -> SagaFilter:
        """Conditions on sagas, in canonical order: equal conditions are equal values."""
        name = message.definition
        from_ms = self.instant_ms(f"{field}.started_from_ms", message.started_from_ms)
        before_ms = self.instant_ms(f"{field}.started_before_ms", message.started_before_ms)
        if 0 < before_ms <= from_ms:
            self.refuse(
                f"{field}.started_before_ms",
                f"{before_ms} is not after started_from_ms, which is {from_ms}: no saga can match",
            )
        return SagaFilter(
            states=self._states(f"{field}.states", message.states),
            definition_name=self.definition_name(f"{field}.definition", name) if name else "",
            started_from_ms=from_ms,
            started_before_ms=before_ms,
            labels=dict(sorted(self.labels(f"{field}.labels", message.labels).items())),
        )

    def _states(self, field: str, numbers: Iterable[int]) -> tuple[SagaState, ...]:
        wanted: set[SagaState] = set()
        for number in dict.fromkeys(numbers):
            if number == types_pb2.SAGA_STATE_UNSPECIFIED:
                return ()  # "any", whatever else is named
            state = wire.saga_state_from_proto(number)
            if state is None:
                known = ", ".join(types_pb2.SagaState.keys())
                self.refuse(field, f"{number} is not a saga's state: those are {known}")
                break
            wanted.add(state)
        return tuple(sorted(wanted))


def _shown(value: str) -> str:
    return repr(value if len(value) <= MAX_SHOWN_CHARS else value[:MAX_SHOWN_CHARS] + "…")
