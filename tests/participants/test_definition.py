"""The definition builder: what it makes, and how it says what is wrong."""

import dataclasses
import json
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

import amends
from amends.v1 import types_pb2
from amends_runtime import wire
from amends_runtime.core import definition as core

ORDER = (
    amends.Definition("order", deadline_s=60, retention_s=86_400)
    .step("reserve", participant="inventory", action="reserve")
    .step(
        "charge",
        "payments",
        "charge",
        timeout_s=5,
        retry=amends.Retry(first_s=0.05, factor=1.5, max_s=2, give_up_after_s=30),
        compensation_retry=amends.Retry(give_up_after_s=3600),
    )
    .read_only("quote", "shipping", "quote", after=["reserve"], uses=[])
    .pivot("ship", "shipping", "ship", after=["charge", "quote"], uses=["charge"])
    .retriable("notify", "orders", "notify")
)


def test_a_definition_becomes_the_message_that_it_describes() -> None:
    """Durations are milliseconds on the wire; what was left out is absent, an empty list is not."""
    message = ORDER.to_proto()
    assert (message.name, message.mode) == ("order", types_pb2.MODE_SAGA)
    assert (message.deadline_ms, message.retention_ms) == (60_000, 86_400_000)
    reserve, charge, quote, ship, notify = message.steps
    assert [step.name for step in message.steps] == ["reserve", "charge", "quote", "ship", "notify"]
    assert (reserve.call.participant, reserve.call.action) == ("inventory", "reserve")
    assert reserve.kind == types_pb2.STEP_KIND_COMPENSATABLE
    assert not reserve.HasField("after")
    assert not reserve.HasField("uses")
    assert not reserve.call.HasField("retry")
    assert charge.call.timeout_ms == 5000
    assert charge.call.retry == types_pb2.RetryPolicy(
        first_ms=50, factor=1.5, max_ms=2000, give_up_after_ms=30_000
    )
    assert charge.call.compensation_retry == types_pb2.RetryPolicy(give_up_after_ms=3_600_000)
    assert quote.kind == types_pb2.STEP_KIND_READ_ONLY
    assert list(quote.after.names) == ["reserve"]
    assert quote.HasField("uses")
    assert list(quote.uses.names) == []
    assert ship.kind == types_pb2.STEP_KIND_PIVOT
    assert list(ship.uses.names) == ["charge"]
    assert notify.kind == types_pb2.STEP_KIND_RETRIABLE


def test_a_definition_survives_the_wire_and_a_file() -> None:
    """What was sent or written is read back as the same definition."""
    assert amends.Definition.from_proto(ORDER.to_proto()) == ORDER
    assert amends.Definition.from_dict(json.loads(json.dumps(ORDER.to_dict()))) == ORDER


def test_each_method_returns_a_new_definition() -> None:
    """One that is half built can be shared: nobody's steps appear in another's."""
    base = amends.Definition("order").step("reserve", "inventory", "reserve")
    with_card = base.step("charge", "payments", "charge")
    with_voucher = base.step("redeem", "vouchers", "redeem")
    assert [step.name for step in base.steps] == ["reserve"]
    assert [step.name for step in with_card.steps] == ["reserve", "charge"]
    assert [step.name for step in with_voucher.steps] == ["reserve", "redeem"]


def test_a_toml_file_is_a_definition() -> None:
    """Kinds may be in lower case, durations may be floats, `after` may be a name alone."""
    definition = amends.Definition.from_dict(
        tomllib.loads(
            """
            name = "order"
            mode = "saga"
            deadline_s = 1.5

            [[steps]]
            name = "reserve"
            participant = "inventory"
            action = "reserve"

            [[steps]]
            name = "ship"
            participant = "shipping"
            action = "ship"
            kind = "pivot"
            after = "reserve"
            timeout_s = 0.25
            retry.give_up_after_s = 30
            """
        )
    )
    assert definition == amends.Definition("order", deadline_s=1.5).step(
        "reserve", "inventory", "reserve"
    ).pivot(
        "ship",
        "shipping",
        "ship",
        after="reserve",
        timeout_s=0.25,
        retry=amends.Retry(give_up_after_s=30),
    )


def test_durations_are_exact_to_the_millisecond() -> None:
    """Floats that mean the same duration make equal definitions."""
    definition = amends.Definition("order", deadline_s=0.1 + 0.2)
    assert definition.deadline_s == 0.3
    assert definition == amends.Definition("order", deadline_s=0.3)


def test_steps_may_refer_to_later_ones() -> None:
    """A graph may be written in any order; references are judged when it is complete."""
    definition = (
        amends.Definition("order")
        .step("charge", "payments", "charge", after=["reserve"])
        .step("reserve", "inventory", "reserve", after=[])
    )
    assert list(definition.to_proto().steps[0].after.names) == ["reserve"]


NAME_RULE = "a lower-case letter, then up to 47 of a-z 0-9 _ -"
DURATION_RULE = "at least 0.001 seconds, not {}; leave it out for the default"


def problems(make: Any) -> list[str]:
    """Call what must not work, and give what was said."""
    with pytest.raises(amends.InvalidDefinition) as caught:
        make()
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return list(caught.value.problems)


def test_a_wrong_step_is_refused_where_it_is_written() -> None:
    """Everything that is wrong with it is said at once, each line with the step."""
    assert problems(
        lambda: amends.Definition("order").step(
            "Charge",
            "127.0.0.1:7000",
            "",
            after=[1],  # type: ignore[list-item]
            timeout_s=-1,
            retry={"first_s": 1},  # type: ignore[arg-type]
        )
    ) == [
        f"step 'Charge': name: must be {NAME_RULE}; it is 'Charge'",
        f"step 'Charge': participant: must be {NAME_RULE}; it is '127.0.0.1:7000'",
        "step 'Charge': action: must be a name, not ''",
        "step 'Charge': after: must be a list of step names, not (1,)",
        f"step 'Charge': timeout_s: must be {DURATION_RULE.format(-1)}",
        "step 'Charge': retry: must be an amends.Retry, not {'first_s': 1}",
    ]


def test_a_name_can_be_used_once() -> None:
    """The second step of a name is refused where it is written."""
    order = amends.Definition("order").step("charge", "payments", "charge")
    assert problems(lambda: order.pivot("charge", "payments", "charge")) == [
        "step 'charge': name: a step before it has the same name; step names are unique"
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(0, "at least 0.001", id="zero"),
        pytest.param(-5, "at least 0.001", id="negative"),
        pytest.param(0.0004, "at least 0.001", id="below a millisecond"),
        pytest.param(float("nan"), "a number of seconds", id="nan"),
        pytest.param(float("inf"), "a number of seconds", id="infinite"),
        pytest.param(10**400, "a number of seconds", id="beyond floats"),
        pytest.param(1e300, "too long", id="beyond the wire"),
        pytest.param(1e306, "too long", id="beyond floats when in milliseconds"),
        pytest.param(1 << 20_000, "a huge int", id="too long to be shown"),
        pytest.param("5s", "a number of seconds", id="text"),
        pytest.param(True, "a number of seconds", id="bool"),
    ],
)
def test_what_is_no_duration_is_refused(value: Any, words: str) -> None:
    """By each field that is one, by name."""
    [deadline] = problems(lambda: amends.Definition("order", deadline_s=value))
    assert deadline.startswith("deadline_s: ")
    assert words in deadline
    [first] = problems(lambda: amends.Retry(first_s=value))
    assert first.startswith("first_s: ")
    assert words in first


@pytest.mark.parametrize("factor", [0, 0.5, -2, float("nan"), "2", True], ids=repr)
def test_a_factor_that_shrinks_waits_is_refused(factor: Any) -> None:
    """A factor is a number of at least 1."""
    [problem] = problems(lambda: amends.Retry(factor=factor))
    assert problem.startswith("factor: must be a number of at least 1")


def test_unknown_references_are_named_with_the_nearest_step() -> None:
    """They are refused before anything is sent."""
    definition = (
        amends.Definition("order")
        .step("reserve", "inventory", "reserve")
        .step("charge", "payments", "charge", after=["reserv"], uses=["zebra"])
        .step("ship", "shipping", "ship", after=["ship"])
    )
    assert problems(definition.to_proto) == [
        "step 'charge': after[0]: there is no step 'reserv'; did you mean 'reserve'?",
        "step 'charge': uses[0]: there is no step 'zebra'; the steps are: reserve, ship",
        "step 'ship': after[0]: is the step itself: leave it out",
    ]


def test_everything_that_is_wrong_with_a_file_is_said_at_once() -> None:
    """Misspelt keys, missing ones, wrong types, unknown kinds and steps: each with its mend."""
    content = {
        "name": "Order",
        "dedline_s": 5,
        "mode": "sagaa",
        "steps": [
            {"name": "reserve", "partcipant": "inventory", "action": "reserve"},
            {
                "name": "charge",
                "participant": "payments",
                "action": "charge",
                "kind": "pivott",
                "after": ["reserv"],
                "timeout_s": "5",
                "retry": {"first": 1, "factor": 0},
                "compensation_retry": 5,
            },
            "ship",
            {"participant": "shipping", "action": "ship"},
        ],
    }
    assert problems(lambda: amends.Definition.from_dict(content)) == [
        "dedline_s: is not a known key; did you mean 'deadline_s'?",
        "step 'reserve': partcipant: is not a known key; did you mean 'participant'?",
        "step 'reserve': participant: is missing: add it",
        "step 'charge': retry.first: is not a known key; did you mean 'first_s'?",
        "step 'charge': retry.factor: must be a number of at least 1, not 0",
        "step 'charge': compensation_retry: must be a table of keys, not 5",
        "step 'charge': kind: 'pivott' is not known; did you mean 'pivot'?",
        "step 'charge': timeout_s: must be a number of seconds, not '5'",
        "steps[2]: must be a table of keys, not 'ship'",
        "steps[3]: name: is missing: add it",
        "step 'charge': after[0]: there is no step 'reserv'; did you mean 'reserve'?",
        "name: must be a lower-case letter, then up to 63 of a-z 0-9 _ -; it is 'Order'",
        "mode: 'sagaa' is not known; did you mean 'saga'?",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param([], "a definition must be a table of keys, not []", id="a list"),
        pytest.param({"steps": []}, "name: is missing: add it", id="no name"),
        pytest.param({"name": "order"}, "steps: is missing: add it", id="no steps"),
        pytest.param(
            {"name": "order", "steps": {"name": "a"}},
            "steps: must be a list of tables, not {'name': 'a'}",
            id="steps are a table",
        ),
        pytest.param(
            {"name": "order", "steps": [], 5: 6},
            "5: is not a known key; the keys are: deadline_s, locked_retries, mode, name, ordered,"
            " retention_s, steps",
            id="a key that is no text",
        ),
    ],
)
def test_what_is_no_definition_is_refused(content: Any, problem: str) -> None:
    """Whatever stands in a file, the answer is `InvalidDefinition` with what is wrong."""
    assert problems(lambda: amends.Definition.from_dict(content)) == [problem]


def test_a_program_is_told_what_a_person_is() -> None:
    """Each problem has its field as a path and as text, its step and its message apart."""
    with pytest.raises(amends.InvalidDefinition) as caught:
        amends.Definition.from_dict(
            {
                "name": "order",
                "steps": [{"name": "a", "participant": "p", "action": "x", "retry": {"max_s": 0}}],
            }
        )
    [problem] = caught.value.details
    assert isinstance(problem, amends.DefinitionProblem)
    assert problem.path == ("steps", 0, "retry", "max_s")
    assert problem.field == "steps[0].retry.max_s"
    assert problem.step == "a"
    assert (problem.file, problem.line, problem.column) == ("", None, None)
    assert caught.value.problems == (f"step 'a': retry.max_s: {problem.message}",)


def test_an_action_that_cannot_be_sent_is_refused() -> None:
    """Half of a surrogate pair, which JSON can hold and protobuf cannot."""
    assert problems(lambda: amends.Definition("order").step("a", "p", "\ud800")) == [
        "step 'a': action: holds half a character, which cannot be sent: '\\ud800'"
    ]


def test_a_list_of_problems_ends() -> None:
    """A hundred are named, and how many more there are."""
    said = problems(
        lambda: amends.Definition.from_dict(
            {"name": "order", "steps": [{}] * 128}  # three keys are missing in each
        )
    )
    assert len(said) == 101
    assert said[-1] == "and 284 more problems; mend these first"


# -- two-phase commit ------------------------------------------------------------------------------

TRANSFER = (
    amends.Definition(
        "transfer",
        mode=amends.Mode.TWO_PHASE_COMMIT,
        ordered=True,
        locked_retries=3,
        deadline_s=5,
    )
    .step("debit", "east", "debit", timeout_s=2)
    .step("credit", "west", "credit")
)


def test_a_two_phase_commit_becomes_the_message_that_it_describes() -> None:
    """Its settings are the contract's; its steps have no order and no kind of their own."""
    message = TRANSFER.to_proto()
    assert message.mode == types_pb2.MODE_TWO_PHASE_COMMIT
    assert message.two_phase == types_pb2.TwoPhaseOptions(ordered=True, locked_retries=3)
    assert message.deadline_ms == 5000
    assert [step.name for step in message.steps if step.HasField("after")] == []
    assert not ORDER.to_proto().HasField("two_phase")


@pytest.mark.parametrize("ordered", [True, False])
def test_a_two_phase_commit_survives_the_wire_and_a_file(*, ordered: bool) -> None:
    """In whichever order votes are asked for; left out in a file is what the builder leaves out."""
    transfer = dataclasses.replace(TRANSFER, ordered=ordered)
    assert amends.Definition.from_proto(transfer.to_proto()) == transfer
    assert amends.Definition.from_dict(json.loads(json.dumps(transfer.to_dict()))) == transfer
    plain = amends.Definition("plain", mode=amends.Mode.TWO_PHASE_COMMIT)
    assert (
        amends.Definition.from_dict({"name": "plain", "mode": "two_phase_commit", "steps": []})
        == plain
    )


@pytest.mark.parametrize("ordered", [True, False])
def test_what_a_runtime_wrote_down_is_the_same_content(*, ordered: bool) -> None:
    """It is read without the order that it drew, and registered again it is no new version."""
    transfer = dataclasses.replace(TRANSFER, ordered=ordered)
    normal = core.normalise(wire.definition_from_proto(transfer.to_proto()))
    fetched = amends.Definition.from_proto(wire.definition_to_proto(normal))
    assert [(step.after, step.uses) for step in fetched.steps] == [(None, None)] * 2
    assert (fetched.ordered, fetched.locked_retries) == (ordered, 3)
    again = wire.definition_from_proto(fetched.to_proto())
    assert core.violations(again) == []
    assert core.content_hash(again) == core.content_hash(normal)
    # Also by a client that hands on the message as it is.
    as_it_is = wire.definition_from_proto(wire.definition_to_proto(normal))
    assert core.violations(as_it_is) == []


def two_phase(**options: Any) -> amends.Definition:
    """A two-phase commit without steps."""
    return amends.Definition("transfer", mode=amends.Mode.TWO_PHASE_COMMIT, **options)


NO_KIND = (
    "step 'debit': kind: in a two-phase commit every step votes and can be rolled back; pivot has a"
    " meaning only in mode SAGA: leave it out"
)
NO_ORDER = (
    "a two-phase commit asks all participants at once, or with `ordered` in the order of the list:"
)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(
            lambda: amends.Definition("order", ordered=True, locked_retries=1),
            [
                f"{name}: it has a meaning only with mode TWO_PHASE_COMMIT: leave it out, or say"
                " that mode"
                for name in ("ordered", "locked_retries")
            ],
            id="settings without the mode",
        ),
        pytest.param(
            lambda: two_phase(ordered="yes", locked_retries=-1),
            [
                "ordered: must be true or false, not 'yes'",
                "locked_retries: must be a whole number from 0, not -1",
            ],
            id="wrong types",
        ),
        pytest.param(
            lambda: two_phase(locked_retries=True),
            ["locked_retries: must be a whole number from 0, not True"],
            id="a truth value for a number",
        ),
        pytest.param(
            lambda: two_phase(locked_retries=101),
            ["locked_retries: 101 is out of range: 0 to 100"],
            id="more tries than there may be",
        ),
        pytest.param(
            lambda: two_phase().pivot("debit", "east", "debit"),
            [NO_KIND],
            id="a kind",
        ),
        pytest.param(
            lambda: two_phase().step("a", "p", "x").step("b", "p", "x", after=["a"], uses=["a"]),
            [f"step 'b': {name}: {NO_ORDER} leave `{name}` out" for name in ("after", "uses")],
            id="an order",
        ),
        pytest.param(
            lambda: two_phase(ordered=True).step("a", "p", "x").step("b", "p", "x", after=[]),
            [f"step 'b': after: {NO_ORDER} leave `after` out"],
            id="no order where there is one",
        ),
        pytest.param(
            lambda: two_phase(
                ordered=True,
                steps=[
                    amends.StepDefinition(name=f"s{n}", participant="p", action="x")
                    for n in range(65)
                ],
            ),
            [
                (
                    "steps: 65 branches; a two-phase commit has at most 64, for all are told its"
                    " decision at once, in whatever order they vote: let one participant do more in"
                    " one branch"
                )
            ],
            id="too many branches",
        ),
    ],
)
def test_what_a_two_phase_commit_cannot_have_is_refused(
    make: Callable[[], object], said: list[str]
) -> None:
    """At the line that says it, in the runtime's own words."""
    assert problems(make) == said


@pytest.mark.parametrize("ordered", [True, False])
def test_the_sdk_refuses_what_the_runtime_would(*, ordered: bool) -> None:
    """The same fields for the same reasons; the one has a file's words, the other the API's."""
    message = two_phase(ordered=ordered).to_proto()
    for number, name in enumerate("abc"):
        step = message.steps.add(name=name, kind=number + 1)
        step.after.names.extend("abc"[:number])
        step.uses.names.extend("abc"[:number])
        step.call.participant = step.call.action = "p"
    found = core.violations(wire.definition_from_proto(message))
    said = problems(lambda: amends.Definition.from_proto(message))
    ours = sorted(line.split(": ", 2)[1] for line in said)
    assert ours == sorted(each.field.rpartition(".")[2] for each in found)
    assert {line.rpartition(": ")[2] for line in said} == {
        each.message.rpartition(": ")[2] for each in found
    }


def test_a_definition_of_a_newer_runtime_is_not_read_wrongly() -> None:
    """What this version cannot express is an error, not something else left out."""
    newer = types_pb2.Definition(
        name="order",
        mode=7,  # type: ignore[arg-type]
        steps=[
            types_pb2.Step(name="wait", sleep=types_pb2.SleepStep(duration_ms=5)),
            types_pb2.Step(name="odd", kind=9, call=types_pb2.CallStep()),  # type: ignore[arg-type]
        ],
        two_phase=types_pb2.TwoPhaseOptions(ordered=True),
    )
    said = problems(lambda: amends.Definition.from_proto(newer))
    assert [line.partition(" is not known")[0] for line in said] == [
        "step 'wait': sleep:",
        "step 'odd': kind: 9",
        "mode: 7",
        "two_phase:",
    ]
