"""OperatorService: definitions, participants, breakers, and what the runtime is."""

import grpc

from amends.v1 import operator_pb2, saga_pb2, types_pb2
from amends_runtime import wire
from amends_runtime.core.definition import content_hash, normalise
from amends_runtime.engine import Engine
from tests.api.refusals import refused
from tests.api.shop import ORDER, Shop
from tests.api.stubs import Operator, Sagas


def order(deadline_ms: int = 0, name: str = "order") -> types_pb2.Definition:
    """The definition that the runtime knows, or another version of it."""
    message = wire.definition_to_proto(ORDER)
    message.deadline_ms = deadline_ms
    message.name = name
    return message


def registering(message: types_pb2.Definition) -> operator_pb2.RegisterDefinitionRequest:
    """A request to register it."""
    return operator_pb2.RegisterDefinitionRequest(definition=message)


async def versions(operator: Operator, *, all_versions: bool) -> list[tuple[str, int, bool]]:
    """Names, versions and which are the latest."""
    answer = await operator.ListDefinitions(
        operator_pb2.ListDefinitionsRequest(all_versions=all_versions)
    )
    return [(one.definition.name, one.version, one.latest) for one in answer.definitions]


# -- definitions -----------------------------------------------------------------------------------


async def test_the_same_content_again_is_a_no_op(operator: Operator) -> None:
    """Said in other words, with its defaults written out or left out, it is the same."""
    for message in (order(), wire.definition_to_proto(normalise(ORDER))):
        answer = await operator.RegisterDefinition(registering(message))
        assert answer.existed
        assert answer.registered.version == 1
        assert answer.registered.latest
        assert answer.registered.content_hash == content_hash(ORDER)
    assert await versions(operator, all_versions=True) == [("order", 1, True)]


async def test_other_content_is_a_new_version(operator: Operator) -> None:
    """Starts get the latest, and each version can be asked for by its hash."""
    second = (await operator.RegisterDefinition(registering(order(60_000)))).registered
    assert (second.version, second.latest) == (2, True)
    assert await versions(operator, all_versions=False) == [("order", 2, True)]
    assert await versions(operator, all_versions=True) == [("order", 1, False), ("order", 2, True)]
    latest = await operator.GetDefinition(operator_pb2.GetDefinitionRequest(name="order"))
    assert latest.registered == second
    first = await operator.GetDefinition(
        operator_pb2.GetDefinitionRequest(name="order", content_hash=content_hash(ORDER))
    )
    assert (first.registered.version, first.registered.latest) == (1, False)
    assert wire.definition_from_proto(first.registered.definition) == normalise(ORDER)


async def test_a_saga_keeps_the_version_that_it_started_with(
    operator: Operator, sagas: Sagas, shop: Shop
) -> None:
    """A new version changes nothing about it, and a repeated start is still the same start."""
    held = shop.hold("reserve")
    request = saga_pb2.StartSagaRequest(saga_id="s-1", definition="order")
    await sagas.StartSaga(request)
    await held.begun.wait()
    await operator.RegisterDefinition(registering(order(60_000)))
    again = await sagas.StartSaga(request)
    assert (again.existed, again.saga.definition_hash) == (True, content_hash(ORDER))


async def test_everything_that_is_wrong_with_a_definition_is_said_at_once(
    operator: Operator,
) -> None:
    """Paths in the request, a mend for each, and nothing is registered."""
    message = order(-1, "Other")
    message.steps[0].after.names.append("shop")
    message.steps[1].call.participant = "shipping"
    message.steps[2].call.timeout_ms = -5
    error = await refused(operator.RegisterDefinition(registering(message)))
    assert (error.code, error.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_DEFINITION",
    )
    assert {
        "definition.name",
        "definition.deadline_ms",
        "definition.steps[0].after",
        "definition.steps[1].call.participant",
        "definition.steps[2].call.timeout_ms",
    } <= set(error.violations)
    assert error.violations["definition.steps[1].call.participant"] == (
        "participant 'shipping' is not registered; the participants are 'shop'; to register it: "
        "amends participants add shipping=HOST:PORT, or [participants.shipping] in the runtime's "
        "configuration"
    )
    assert await versions(operator, all_versions=True) == [("order", 1, True)]


async def test_a_definition_of_nonsense_is_refused_within_grpcs_limits(operator: Operator) -> None:
    """Hundreds of violations fit no trailer; the first are shown, and that there are more."""
    message = types_pb2.Definition(name="ö" * 100_000)
    for number in range(128):
        step = message.steps.add(name=f"Ä{number}%" * 50)
        step.after.names.extend(["nobody", "ÖÖÖ" * 30])
        step.call.SetInParent()
    error = await refused(operator.RegisterDefinition(registering(message)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert int(error.metadata["violations"]) >= 100
    assert 3 < len(error.violations) <= int(error.metadata["violations_shown"])
    assert "more" in error.message


async def test_an_unknown_definition_is_not_found_with_a_suggestion(operator: Operator) -> None:
    """The nearest name; and a name that cannot be is refused as such."""
    error = await refused(operator.GetDefinition(operator_pb2.GetDefinitionRequest(name="ordered")))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_DEFINITION")
    assert "did you mean 'order'?" in error.message
    error = await refused(
        operator.GetDefinition(operator_pb2.GetDefinitionRequest(content_hash="x"))
    )
    assert set(error.violations) == {"name", "content_hash"}


async def diff(
    operator: Operator, message: types_pb2.Definition
) -> operator_pb2.DiffDefinitionResponse:
    """How it differs."""
    return await operator.DiffDefinition(operator_pb2.DiffDefinitionRequest(definition=message))


async def test_a_diff_says_what_would_change_and_changes_nothing(operator: Operator) -> None:
    """The same, another version, a new definition."""
    assert await diff(operator, order()) == operator_pb2.DiffDefinitionResponse(same=True)
    changed = await diff(operator, order(60_000))
    assert not changed.same
    assert list(changed.differences) == ["deadline_ms was 0, becomes 60000"]
    new = await diff(operator, order(name="other"))
    assert list(new.differences) == ["definition 'other' is new"]
    assert await versions(operator, all_versions=True) == [("order", 1, True)]


async def test_a_diff_lists_what_registration_would_refuse(operator: Operator) -> None:
    """What the core cannot say, and what it would refuse, by field."""
    message = order(-1)
    message.steps[1].sleep.duration_ms = 5
    message.steps[2].call.participant = "nobody"
    answer = await diff(operator, message)
    assert not answer.same
    assert {violation.reason for violation in answer.violations} == {"INVALID_DEFINITION"}
    assert {violation.metadata["field"] for violation in answer.violations} >= {
        "definition.deadline_ms",
        "definition.steps[1].sleep",
        "definition.steps[2].call.participant",
    }


# -- participants and the runtime ------------------------------------------------------------------


async def test_participants_show_their_lane_and_breaker(
    operator: Operator, sagas: Sagas, shop: Shop
) -> None:
    """Where it is, where that stands, how it is called, and what is under way."""
    held = shop.hold("reserve")
    await sagas.StartSaga(saga_pb2.StartSagaRequest(saga_id="s-1", definition="order"))
    await held.begun.wait()
    answer = await operator.ListParticipants(operator_pb2.ListParticipantsRequest())
    (participant,) = answer.participants
    assert (participant.name, participant.address) == ("shop", shop.address)
    assert participant.source == operator_pb2.PARTICIPANT_SOURCE_CONFIGURATION
    assert (participant.transport, participant.concurrency_limit) == ("exchange", 512)
    assert (participant.calls_in_flight, participant.calls_waiting) == (1, 0)
    assert participant.breaker.state == operator_pb2.BREAKER_STATE_CLOSED
    breakers = (await operator.ListBreakers(operator_pb2.ListBreakersRequest())).breakers
    assert list(breakers) == [participant.breaker]


async def test_the_runtime_says_what_it_is(
    operator: Operator, sagas: Sagas, engine: Engine, shop: Shop
) -> None:
    """Its version, its store, its epoch, and its sagas by state; none is without a wake-up."""
    await sagas.StartSaga(
        saga_pb2.StartSagaRequest(saga_id="s-0", definition="order", wait_ms=60_000)
    )
    held = shop.hold("reserve")
    await sagas.StartSaga(saga_pb2.StartSagaRequest(saga_id="s-1", definition="order"))
    await held.begun.wait()
    answer = await operator.GetRuntime(operator_pb2.GetRuntimeRequest())
    identity = engine.store.identity
    assert answer.version
    assert (answer.store_id, answer.incarnation) == (identity.store_id, identity.incarnation)
    assert answer.epoch == identity.epoch
    assert answer.started_at_ms > 0
    assert dict(answer.sagas) == {"COMPLETED": 1, "RUNNING": 1}
    assert answer.without_wake_up == 0
