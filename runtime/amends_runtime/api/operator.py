"""OperatorService: definitions, participants, breakers, the runtime itself, and sagas by hand.

Some of the verbs that change a saga come in a later version; their methods say what to use now.
"""

from __future__ import annotations

from typing import Final

import msgspec
import structlog

from amends.v1 import operator_pb2, operator_pb2_grpc, types_pb2
from amends_runtime import wire
from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.supervisor import Supervisor
from amends_runtime.api.by_hand import called_now, not_abandoned, not_retried
from amends_runtime.api.differences import differences
from amends_runtime.api.door import Context, Door, answering, not_available
from amends_runtime.api.status import ShuttingDown
from amends_runtime.api.unregistered import with_remedies
from amends_runtime.api.validation import Checks
from amends_runtime.core.definition import content_hash, violations
from amends_runtime.core.saga import Answer, remaining_steps
from amends_runtime.dispatch.lanes import Lanes, LaneStatus
from amends_runtime.dispatch.participants import Participants
from amends_runtime.dispatch.reaching import why_not_reached
from amends_runtime.errors import FieldViolation, InvalidRequest, NotFound, WrongState
from amends_runtime.ports import (
    Clock,
    OperatorWords,
    RegisteredDefinition,
    Store,
    StoreIdentity,
)

__all__ = ["OperatorService", "RuntimeFacts"]

_log = structlog.get_logger(__name__)

_BY_HAND: Final = (
    "this verb is not available in this version: a stuck saga can be retried and abandoned, and"
    " cancelling turns back one that still can be"
)
MAX_RESPONSE_BYTES: Final = 4 * 1024 * 1024
"""What clients take by default."""


class RuntimeFacts(msgspec.Struct, frozen=True):
    """What does not change while a runtime lives."""

    version: str
    identity: StoreIdentity
    started_at_ms: int


class OperatorService(operator_pb2_grpc.OperatorServiceServicer):
    """The runtime, from the inside."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        definitions: Definitions,
        lanes: Lanes,
        participants: Participants,
        store: Store,
        clock: Clock,
        facts: RuntimeFacts,
        door: Door,
    ) -> None:
        self.door = door
        self._supervisor = supervisor
        self._definitions = definitions
        self._lanes = lanes
        self._participants = participants
        self._store = store
        self._clock = clock
        self._facts = facts

    # -- definitions ---------------------------------------------------------------------------

    @answering
    async def RegisterDefinition(
        self, request: operator_pb2.RegisterDefinitionRequest, context: Context
    ) -> operator_pb2.RegisterDefinitionResponse:
        definition = wire.definition_from_proto(request.definition)
        try:
            registered, existed = await self._definitions.register(definition)
        except InvalidRequest as refusal:
            found = with_remedies(refusal.violations, definition, self._lanes.names())
            raise InvalidRequest(refusal.reason, found, refusal.metadata) from None
        return operator_pb2.RegisterDefinitionResponse(
            registered=self._shown(registered), existed=existed
        )

    @answering
    async def GetDefinition(
        self, request: operator_pb2.GetDefinitionRequest, context: Context
    ) -> operator_pb2.GetDefinitionResponse:
        checks = Checks()
        name = checks.definition_name("name", request.name)
        hash_ = checks.content_hash("content_hash", request.content_hash)
        checks.passed()
        registered = self._definitions.find(name, hash_)
        return operator_pb2.GetDefinitionResponse(registered=self._shown(registered))

    @answering
    async def ListDefinitions(
        self, request: operator_pb2.ListDefinitionsRequest, context: Context
    ) -> operator_pb2.ListDefinitionsResponse:
        shown = map(self._shown, self._definitions.all())
        response = operator_pb2.ListDefinitionsResponse(
            definitions=[one for one in shown if one.latest or request.all_versions]
        )
        size = response.ByteSize()
        if size > MAX_RESPONSE_BYTES:
            raise WrongState(
                "ANSWER_TOO_LARGE",
                f"all definitions together have {size} bytes, and a client takes"
                f" {MAX_RESPONSE_BYTES} by default: leave out older versions, or ask by name",
                {"bytes": str(size), "limit": str(MAX_RESPONSE_BYTES)},
            )
        return response

    @answering
    async def DiffDefinition(
        self, request: operator_pb2.DiffDefinitionRequest, context: Context
    ) -> operator_pb2.DiffDefinitionResponse:
        definition, found = wire.read_definition(request.definition)
        found += [
            FieldViolation(violation.field, violation.message)
            for violation in violations(definition, self._lanes.names())
        ]
        found = with_remedies(found, definition, self._lanes.names())
        response = operator_pb2.DiffDefinitionResponse(
            violations=[
                types_pb2.Error(
                    reason="INVALID_DEFINITION",
                    message=violation.message,
                    metadata={"field": f"definition.{violation.field}"},
                )
                for violation in found
            ]
        )
        try:
            latest = self._definitions.find(definition.name)
        except NotFound:
            response.differences.append(f"definition {definition.name[:64]!r} is new")
            return response
        response.differences.extend(differences(latest.definition, definition))
        response.same = not found and latest.content_hash == content_hash(definition)
        return response

    def _shown(self, registered: RegisteredDefinition) -> types_pb2.RegisteredDefinition:
        latest = self._definitions.is_latest(registered)
        return wire.registered_to_proto(registered, latest=latest)

    # -- participants --------------------------------------------------------------------------

    @answering
    async def ListParticipants(
        self, request: operator_pb2.ListParticipantsRequest, context: Context
    ) -> operator_pb2.ListParticipantsResponse:
        return operator_pb2.ListParticipantsResponse(
            participants=map(self._shown_participant, self._lanes.status())
        )

    @answering
    async def PutParticipant(
        self, request: operator_pb2.PutParticipantRequest, context: Context
    ) -> operator_pb2.PutParticipantResponse:
        checks = Checks()
        name = checks.participant_name("name", request.name)
        address = checks.address("address", request.address)
        author, reason, request_id = checks.audit("audit", request.audit)
        checks.passed()
        if self.door.closing:
            raise ShuttingDown
        await self._participants.put(name, address, author, reason, request_id=request_id)
        # Durable by now, and so it stays: a wrong address is said while its giver still looks.
        nobody = await why_not_reached(address)
        shown = self._shown_participant(self._lanes.of(name).status())
        if nobody and not shown.last_error and shown.address == address:
            shown.last_error = nobody
        return operator_pb2.PutParticipantResponse(participant=shown)

    @answering
    async def RemoveParticipant(
        self, request: operator_pb2.RemoveParticipantRequest, context: Context
    ) -> operator_pb2.RemoveParticipantResponse:
        checks = Checks()
        name = checks.participant_name("name", request.name)
        author, reason, request_id = checks.audit("audit", request.audit)
        checks.passed()
        if self.door.closing:
            raise ShuttingDown
        await self._participants.remove(name, author, reason, request_id=request_id)
        return operator_pb2.RemoveParticipantResponse()

    def _shown_participant(self, lane: LaneStatus) -> operator_pb2.Participant:
        shown = wire.participant_to_proto(lane, self._participants.configured_address(lane.name))
        shown.last_error = self._participants.why_unconnected(lane.name) or shown.last_error
        return shown

    @answering
    async def ListBreakers(
        self, request: operator_pb2.ListBreakersRequest, context: Context
    ) -> operator_pb2.ListBreakersResponse:
        return operator_pb2.ListBreakersResponse(
            breakers=[
                wire.breaker_to_proto(lane.name, lane.breaker) for lane in self._lanes.status()
            ]
        )

    # -- sagas by hand -------------------------------------------------------------------------

    @answering
    async def RetrySaga(
        self, request: operator_pb2.RetrySagaRequest, context: Context
    ) -> operator_pb2.RetrySagaResponse:
        checks = Checks()
        saga_id = checks.saga_id("saga_id", request.saga_id)
        step = checks.step_name("step", request.step)
        author, reason, request_id = checks.audit("audit", request.audit)
        checks.passed()
        view, answer = await self._supervisor.retry_saga(
            saga_id, step, author, reason, request_id=request_id
        )
        if answer is not Answer.RETRIED:
            raise not_retried(view, answer, step)
        for participant in called_now(view, step):
            self._lanes.of(participant).probe_now()
        return operator_pb2.RetrySagaResponse(saga=wire.saga_to_proto(view))

    @answering
    async def AbandonSaga(
        self, request: operator_pb2.AbandonSagaRequest, context: Context
    ) -> operator_pb2.AbandonSagaResponse:
        checks = Checks()
        saga_id = checks.saga_id("saga_id", request.saga_id)
        author, reason, request_id = checks.audit("audit", request.audit)
        checks.passed()
        view, answer = await self._supervisor.abandon_saga(
            saga_id, author, reason, force=request.force, request_id=request_id
        )
        if answer is Answer.ABORTED:  # its participants are told, so that nothing stays behind
            return operator_pb2.AbandonSagaResponse(saga=wire.saga_to_proto(view))
        if answer not in (Answer.ABANDONED, Answer.ALREADY_ABANDONED):
            raise not_abandoned(view, answer)
        return operator_pb2.AbandonSagaResponse(
            saga=wire.saga_to_proto(view),
            remaining_steps=[
                view.plan.steps[number].name for number in remaining_steps(view.plan, view.saga)
            ],
        )

    # -- the runtime ---------------------------------------------------------------------------

    @answering
    async def GetRuntime(
        self, request: operator_pb2.GetRuntimeRequest, context: Context
    ) -> operator_pb2.GetRuntimeResponse:
        by_state = await self._store.count_by_state()
        identity = self._facts.identity
        return operator_pb2.GetRuntimeResponse(
            version=self._facts.version,
            store_id=identity.store_id,
            incarnation=identity.incarnation,
            epoch=identity.epoch,
            started_at_ms=self._facts.started_at_ms,
            sagas={state.name: count for state, count in by_state.items()},
            without_wake_up=(await self._supervisor.survey()).without_wake_up,
            restored=self._store.restored,
        )

    @answering
    async def ConfirmRestore(
        self, request: operator_pb2.ConfirmRestoreRequest, context: Context
    ) -> operator_pb2.ConfirmRestoreResponse:
        checks = Checks()
        incarnation = checks.incarnation("incarnation", request.incarnation)
        author, reason, request_id = checks.audit("audit", request.audit)
        checks.passed()
        if self.door.closing:
            raise ShuttingDown
        here = self._facts.identity.incarnation
        if incarnation != here:
            raise WrongState(
                "OTHER_INCARNATION",
                f"this store is not incarnation {incarnation} but {here}: what was looked at is not"
                " what is here. Nothing was confirmed; look at it again, and name the incarnation"
                " that the runtime shows now",
                {"incarnation": here},
            )
        words = OperatorWords(author, reason, self._clock.now_ms(), request_id)
        confirmed = await self._supervisor.confirm_restore(words)
        if confirmed:
            _log.warning("restore_confirmed", incarnation=here, author=author)
        return operator_pb2.ConfirmRestoreResponse(confirmed=confirmed)

    # -- what comes later ----------------------------------------------------------------------

    SetBreaker = not_available(
        "breakers cannot be set by hand in this version: they close by themselves once the"
        " participant answers a probe"
    )
    SkipStep = not_available(_BY_HAND)
    ForceCompensation = not_available(_BY_HAND)
    PauseSaga = not_available(_BY_HAND)
    ResumeSaga = not_available(_BY_HAND)
    ResolveStep = not_available(_BY_HAND)
    RunBulk = not_available(_BY_HAND)
