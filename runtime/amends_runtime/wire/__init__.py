"""The only translation between the contract's messages and the core's values.

Out goes what is true already, so nothing on the way out can fail. What comes in is somebody else's
and may be anything: `definition_from_proto` refuses, naming everything that is wrong, and
`outcome_from_proto` never does, because nonsense from a participant is only an unknown outcome.
"""

from amends_runtime.wire.calls import (
    MAX_OUTCOME_MESSAGE_CHARS,
    MAX_OUTCOME_REASON_CHARS,
    add_exchange_call,
    call_to_proto,
    idempotency_key,
    outcome_from_proto,
    put_call,
)
from amends_runtime.wire.definitions import (
    definition_from_proto,
    definition_to_proto,
    read_definition,
    registered_to_proto,
)
from amends_runtime.wire.history import record_to_proto
from amends_runtime.wire.participants import LaneView, breaker_to_proto, participant_to_proto
from amends_runtime.wire.payloads import (
    MAX_CONTENT_TYPE_BYTES,
    MAX_PAYLOAD_BYTES,
    payload_from_proto,
    payload_to_proto,
    start_content_hash,
)
from amends_runtime.wire.sagas import (
    SagaView,
    decision_to_proto,
    put_contents,
    put_saga,
    saga_state_from_proto,
    saga_to_proto,
    summary_to_proto,
)

__all__ = [
    "MAX_CONTENT_TYPE_BYTES",
    "MAX_OUTCOME_MESSAGE_CHARS",
    "MAX_OUTCOME_REASON_CHARS",
    "MAX_PAYLOAD_BYTES",
    "LaneView",
    "SagaView",
    "add_exchange_call",
    "breaker_to_proto",
    "call_to_proto",
    "decision_to_proto",
    "definition_from_proto",
    "definition_to_proto",
    "idempotency_key",
    "outcome_from_proto",
    "participant_to_proto",
    "payload_from_proto",
    "payload_to_proto",
    "put_call",
    "put_contents",
    "put_saga",
    "read_definition",
    "record_to_proto",
    "registered_to_proto",
    "saga_state_from_proto",
    "saga_to_proto",
    "start_content_hash",
    "summary_to_proto",
]
