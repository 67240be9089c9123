"""Definitions: what is refused and how it says so, what defaults mean, what the plan works out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amends_runtime.core.definition import (
    COMPENSATION_RETRY,
    FORWARD_RETRY,
    MAX_DURATION_MS,
    MAX_PARALLEL,
    MAX_STEPS,
    MAX_VIOLATIONS,
    MUST_SUCCEED_RETRY,
    Definition,
    Kind,
    Mode,
    Plan,
    RetryPolicy,
    Step,
    TwoPhase,
    content_hash,
    normalise,
    violations,
)
from tests.core.definitions import plans


def step(name: str, kind: Kind = Kind.COMPENSATABLE, **fields: object) -> Step:
    """A step whose participant and action need no thought."""
    return msgspec.convert(
        {"name": name, "participant": "shop", "action": "act", "kind": kind, **fields}, Step
    )


def definition(*steps: Step, **fields: object) -> Definition:
    """A definition called `order`."""
    made = Definition(name="order", steps=steps)
    return msgspec.structs.replace(made, **fields)


def votes(*steps: Step, **fields: object) -> Definition:
    """A two-phase commit called `order`."""
    return definition(*steps, mode=Mode.TWO_PHASE_COMMIT, **fields)


ORDER = definition(step("reserve"), step("charge"), step("ship", Kind.PIVOT))


def said(
    found: Definition, participants: Iterable[str] | None = None
) -> list[tuple[str, str, str]]:
    """All violations as (field, step, message)."""
    known = None if participants is None else list(participants)
    return [(one.field, one.step, one.message) for one in violations(found, known)]


# -- what is refused -------------------------------------------------------------------------------

LONG = "a" * 49
NAME_RULE = "use a lower-case letter, then up to 47 of a-z 0-9 _ -"

REFUSED = {
    "definition name, empty": (
        definition(step("a"), name=""),
        ("name", "", "'' is not a definition name: use a lower-case letter, then up to 63 of"),
    ),
    "definition name, upper case": (
        definition(step("a"), name="Order"),
        ("name", "", "'Order' is not a definition name"),
    ),
    "definition name, a line break at its end": (
        definition(step("a"), name="order\n"),
        ("name", "", r"'order\n' is not a definition name"),
    ),
    "definition name, too long is shortened in the message": (
        definition(step("a"), name="a" * 500),
        ("name", "", f"'{'a' * 64}…' is not a definition name"),
    ),
    "two-phase commit's settings in a saga": (
        definition(step("a"), two_phase=TwoPhase()),
        ("two_phase", "", "it has a meaning only with mode TWO_PHASE_COMMIT: leave it out"),
    ),
    "too many rounds": (
        votes(step("a"), two_phase=TwoPhase(locked_retries=101)),
        ("two_phase.locked_retries", "", "101 is out of range: 0 to 100"),
    ),
    "a number of rounds below none": (
        votes(step("a"), two_phase=TwoPhase(locked_retries=-1)),
        ("two_phase.locked_retries", "", "-1 is out of range: 0 to 100"),
    ),
    "a pivot among votes": (
        votes(step("a"), step("b", Kind.PIVOT)),
        ("steps[1].kind", "b", "PIVOT has a meaning only in mode SAGA: leave it out"),
    ),
    "votes that wait for each other": (
        votes(step("a"), step("b", after=["a"])),
        (
            "steps[1].after",
            "b",
            "or with two_phase.ordered in the order of the list: leave `after`",
        ),
    ),
    "votes that use what nobody brings": (
        votes(step("a"), step("b", uses=["a"])),
        ("steps[1].uses", "b", "leave `uses` out"),
    ),
    "votes without an order in order": (
        votes(step("a"), step("b", after=[]), two_phase=TwoPhase(ordered=True)),
        ("steps[1].after", "b", "leave `after` out"),
    ),
    "too many votes at once": (
        votes(*(step(f"s{n}") for n in range(MAX_PARALLEL + 1))),
        ("steps", "", "65 branches; a two-phase commit has at most 64"),
    ),
    "too many votes in order": (
        votes(
            *(step(f"s{n}") for n in range(MAX_PARALLEL + 1)),
            two_phase=TwoPhase(ordered=True),
        ),
        ("steps", "", "65 branches; a two-phase commit has at most 64, for all are told its"),
    ),
    "too many votes for any definition": (
        votes(*(step(f"s{n}") for n in range(MAX_STEPS + 1))),
        ("steps", "", "129 branches; a two-phase commit has at most 64"),
    ),
    "deadline, negative": (
        definition(step("a"), deadline_ms=-1),
        (
            *("deadline_ms", ""),
            f"-1 is out of range: 1 to {MAX_DURATION_MS} ms; leave it out for the default",
        ),
    ),
    "deadline, beyond ten years": (
        definition(step("a"), deadline_ms=MAX_DURATION_MS + 1),
        ("deadline_ms", "", f"{MAX_DURATION_MS + 1} is out of range"),
    ),
    "retention": (
        definition(step("a"), retention_ms=-5),
        ("retention_ms", "", "-5 is out of range"),
    ),
    "no steps": (
        definition(),
        ("steps", "", "a definition needs at least one step"),
    ),
    "too many steps": (
        definition(*(step(f"s{n}") for n in range(MAX_STEPS + 1))),
        ("steps", "", "129 steps; at most 128: split it into several sagas"),
    ),
    "step name": (
        definition(step("9lives")),
        ("steps[0].name", "9lives", f"'9lives' is not a step name: {NAME_RULE}"),
    ),
    "step name, too long": (
        definition(step(LONG)),
        ("steps[0].name", LONG, f"'{LONG}' is not a step name: {NAME_RULE}"),
    ),
    "step name, twice": (
        definition(step("a"), step("a")),
        ("steps[1].name", "a", "'a' is used twice: step names are unique in a definition"),
    ),
    "participant, an address": (
        definition(step("a", participant="10.0.0.1:80")),
        (
            "steps[0].call.participant",
            "a",
            f"'10.0.0.1:80' is not a participant's name (never an address): {NAME_RULE}",
        ),
    ),
    "action": (
        definition(step("a", action="charge it")),
        ("steps[0].call.action", "a", "'charge it' is not an action name: use a letter, then up"),
    ),
    "timeout, zero": (
        definition(step("a", timeout_ms=0)),
        ("steps[0].call.timeout_ms", "a", "0 is out of range: 1 to 86400000 ms"),
    ),
    "timeout, over a day": (
        definition(step("a", timeout_ms=86_400_001)),
        ("steps[0].call.timeout_ms", "a", "86400001 is out of range: 1 to 86400000 ms"),
    ),
    "retry, first": (
        definition(step("a", retry=RetryPolicy(first_ms=0))),
        ("steps[0].call.retry.first_ms", "a", f"0 is out of range: 1 to {MAX_DURATION_MS} ms"),
    ),
    "retry, most": (
        definition(step("a", retry=RetryPolicy(max_ms=MAX_DURATION_MS + 1))),
        ("steps[0].call.retry.max_ms", "a", "is out of range"),
    ),
    "retry, most below first": (
        definition(step("a", retry=RetryPolicy(first_ms=50, max_ms=20))),
        ("steps[0].call.retry.max_ms", "a", "20 is below first_ms, which is 50"),
    ),
    "retry, give up": (
        definition(step("a", retry=RetryPolicy(give_up_after_ms=-1))),
        ("steps[0].call.retry.give_up_after_ms", "a", "-1 is out of range"),
    ),
    "retry, factor below one": (
        definition(step("a", retry=RetryPolicy(factor=0.5))),
        ("steps[0].call.retry.factor", "a", "0.5 is out of range: 1 to 100"),
    ),
    "retry, factor no number": (
        definition(step("a", retry=RetryPolicy(factor=math.nan))),
        ("steps[0].call.retry.factor", "a", "nan is out of range: 1 to 100"),
    ),
    "compensation retry": (
        definition(step("a", compensation_retry=RetryPolicy(factor=math.inf))),
        ("steps[0].call.compensation_retry.factor", "a", "inf is out of range: 1 to 100"),
    ),
    "after itself": (
        definition(step("a", after=["a"])),
        ("steps[0].after", "a", "step 'a' names itself"),
    ),
    "after a misspelt step": (
        definition(step("reserve"), step("charge", after=["reserv"])),
        ("steps[1].after", "charge", "there is no step 'reserv'; did you mean 'reserve'?"),
    ),
    "after a step that is nothing like any": (
        definition(step("reserve"), step("charge", after=["zzz"])),
        ("steps[1].after", "charge", "there is no step 'zzz'; the steps are 'reserve', 'charge'"),
    ),
    "uses a misspelt step": (
        definition(step("reserve"), step("charge", uses=["reservee"])),
        ("steps[1].uses", "charge", "there is no step 'reservee'; did you mean 'reserve'?"),
    ),
    "uses itself": (
        definition(step("a", uses=["a"])),
        ("steps[0].uses", "a", "step 'a' names itself"),
    ),
    "uses what it does not come after": (
        definition(step("a"), step("b", after=[]), step("c", after=["a"], uses=["b"])),
        (
            "steps[2].uses",
            "c",
            "step 'c' uses 'b' but does not come after it: add 'b' to its `after`",
        ),
    ),
    "a cycle": (
        definition(
            step("a", after=["c"]), step("b", after=["a"]), step("c", after=["b"]), step("d")
        ),
        (
            "steps[0].after",
            "a",
            "steps wait for each other: a -> c -> b -> a; take one of these out of `after`",
        ),
    ),
    "a second pivot": (
        definition(step("a", Kind.PIVOT), step("b", Kind.PIVOT)),
        (
            "steps[1].kind",
            "b",
            "'a' is the pivot already: a definition has at most one; make this one RETRIABLE",
        ),
    ),
    "compensatable after the pivot": (
        definition(step("a", Kind.PIVOT), step("b")),
        (
            "steps[1].kind",
            "b",
            (
                "the pivot 'a' does not wait for this compensatable step: it could still fail when"
                " nothing can be undone; put it before the pivot, or make it RETRIABLE after it"
            ),
        ),
    ),
    "compensatable beside the pivot": (
        definition(step("a"), step("b", Kind.PIVOT, after=[])),
        ("steps[0].kind", "a", "the pivot 'b' does not wait for this compensatable step"),
    ),
    "retriable before the pivot": (
        definition(step("a", Kind.RETRIABLE), step("b", Kind.PIVOT)),
        (
            "steps[0].kind",
            "a",
            (
                "a retriable step cannot be undone, so it must come after the pivot 'b':"
                " add it to `after`, or make this step COMPENSATABLE"
            ),
        ),
    ),
    "compensatable after a retriable": (
        definition(step("a"), step("b", Kind.RETRIABLE), step("c")),
        (
            "steps[2].kind",
            "c",
            (
                "it comes after the retriable step 'b', which cannot be undone:"
                " move it before, or make it RETRIABLE"
            ),
        ),
    ),
    "too wide": (
        definition(*(step(f"s{n}", after=[]) for n in range(MAX_PARALLEL + 1))),
        ("steps", "", "up to 65 steps could run at once; at most 64: let some wait for others"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_fault_is_refused_by_the_field_with_the_mend(what: str) -> None:
    """One violation names the field's path and its step, what is wrong and how to mend it."""
    wrong, (field, name, message) = REFUSED[what]
    found = said(wrong)
    assert [(one[0], one[1]) for one in found] == [(field, name)]
    assert message in found[0][2]


def test_an_unregistered_participant_is_refused_with_the_nearest() -> None:
    """Where the registered participants are known, a misspelt one is named with what was meant."""
    wrong = definition(step("a", participant="shopp"))
    assert said(wrong, {"shop", "bank"}) == [
        (
            "steps[0].call.participant",
            "a",
            "participant 'shopp' is not registered; did you mean 'shop'?",
        )
    ]
    assert said(wrong, {"bank"})[0][2].endswith("the participants are 'bank'")
    assert said(wrong, [])[0][2].endswith("is not registered; there are none")
    assert said(wrong) == []


def test_everything_wrong_is_said_at_once() -> None:
    """Faults of fields, of references and of the graph come in one answer, in the text's order."""
    wrong = definition(
        step("a", timeout_ms=0),
        step("b", Kind.PIVOT, action=""),
        step("c", participant="nobody", uses=["zzz"]),
        step("d", Kind.PIVOT, after=["b"]),
        deadline_ms=-1,
    )
    assert [(field, name) for field, name, _ in said(wrong, {"shop"})] == [
        ("deadline_ms", ""),
        ("steps[0].call.timeout_ms", "a"),
        ("steps[1].call.action", "b"),
        ("steps[2].uses", "c"),
        ("steps[2].call.participant", "c"),
        ("steps[3].kind", "d"),
    ]


def test_every_cycle_is_named() -> None:
    """Two circles that have nothing to do with each other are two violations."""
    wrong = definition(
        step("a", after=["b"]),
        step("b", after=["a"]),
        step("c", after=["d"]),
        step("d", after=["c"]),
    )
    assert [field for field, _, _ in said(wrong)] == ["steps[0].after", "steps[2].after"]


def test_the_graph_is_not_judged_while_names_are_broken() -> None:
    """With a name used twice nobody can say who waits for whom: only the name is refused."""
    wrong = definition(step("a"), step("a"), step("b", Kind.PIVOT, after=[]))
    assert [field for field, _, _ in said(wrong)] == ["steps[1].name"]


def test_a_hostile_definition_is_refused_without_telling_all_of_it() -> None:
    """Of thousands of faults in fields the first are named: more nobody would mend at once."""
    wrong = definition(*(step(f"s{n}", action="", timeout_ms=0) for n in range(MAX_STEPS)))
    assert len(said(wrong)) == MAX_VIOLATIONS


def test_the_longest_names_and_the_limits_themselves_are_allowed() -> None:
    """Each bound is the last value that passes."""
    widest = definition(
        *(step(f"s{n}", after=[]) for n in range(MAX_PARALLEL)),
        *(step(f"t{n}", after=[f"s{n}"]) for n in range(MAX_STEPS - MAX_PARALLEL)),
        name="a" * 64,
        deadline_ms=MAX_DURATION_MS,
    )
    assert said(widest) == []
    assert said(definition(step("a" * 48, timeout_ms=86_400_000))) == []


def test_read_only_steps_may_stand_anywhere() -> None:
    """Before the pivot, beside it and after it: there is nothing to undo."""
    assert (
        said(
            definition(
                step("quote", Kind.READ_ONLY, after=[]),
                step("reserve", after=[]),
                step("ship", Kind.PIVOT, after=["reserve"]),
                step("look", Kind.READ_ONLY, after=["ship"]),
                step("notify", Kind.RETRIABLE, after=["look"]),
            )
        )
        == []
    )


def test_width_counts_what_can_run_at_once_not_what_is_listed() -> None:
    """Without a pivot retriable steps wait for all compensatable ones, drawn or not."""
    half = MAX_PARALLEL * 3 // 4
    assert (
        said(
            definition(
                *(step(f"c{n}", after=[]) for n in range(half)),
                *(step(f"r{n}", Kind.RETRIABLE, after=[]) for n in range(half)),
            )
        )
        == []
    )


# -- what defaults mean ----------------------------------------------------------------------------


def test_a_plain_list_is_sequential_and_uses_all_before_it() -> None:
    """The default of `after` is the step before, that of `uses` everything that it comes after."""
    steps = normalise(ORDER).steps
    assert [one.after for one in steps] == [(), ("reserve",), ("charge",)]
    assert [one.uses for one in steps] == [(), ("reserve",), ("reserve", "charge")]


def test_an_explicit_after_makes_a_graph() -> None:
    """`uses` follows the graph and not the list; the step after a branch still defaults to it."""
    diamond = definition(
        step("a"),
        step("b", after=["a"]),
        step("c", after=["a"]),
        step("d", after=["b", "c"]),
        step("e"),
    )
    steps = normalise(diamond).steps
    assert [one.uses for one in steps] == [
        (),
        ("a",),
        ("a",),
        ("a", "b", "c"),
        ("a", "b", "c", "d"),
    ]
    assert steps[4].after == ("d",)


def test_an_empty_after_is_a_root_and_an_empty_uses_is_nothing() -> None:
    """An empty tuple is a statement, not an absence."""
    steps = normalise(definition(step("a"), step("b", after=[]), step("c", uses=[]))).steps
    assert (steps[1].after, steps[2].uses) == ((), ())


def test_what_must_succeed_is_tried_for_a_day() -> None:
    """Pivot and retriable steps give up after 24 h, the others after 5 min, compensations 24 h."""
    steps = normalise(
        definition(
            step("a"),
            step("b", Kind.READ_ONLY),
            step("c", Kind.PIVOT),
            step("d", Kind.RETRIABLE),
        )
    ).steps
    assert [one.retry for one in steps] == [
        FORWARD_RETRY,
        FORWARD_RETRY,
        MUST_SUCCEED_RETRY,
        MUST_SUCCEED_RETRY,
    ]
    assert {one.compensation_retry for one in steps} == {COMPENSATION_RETRY}
    assert RetryPolicy(100, 2.0, 30_000, 300_000) == FORWARD_RETRY
    assert MUST_SUCCEED_RETRY.give_up_after_ms == COMPENSATION_RETRY.give_up_after_ms == 86_400_000


def test_a_policy_that_is_given_is_kept() -> None:
    """Defaults stand in for what is absent only."""
    policy = RetryPolicy(1, 1.5, 2, 3)
    one = normalise(
        definition(step("a", Kind.PIVOT, retry=policy, compensation_retry=policy))
    ).steps[0]
    assert (one.retry, one.compensation_retry) == (policy, policy)


def test_nothing_is_left_to_a_default() -> None:
    """Normalised content is stored: a later release's other default reaches no running saga."""
    stored = msgspec.json.decode(msgspec.json.encode(normalise(definition(step("a")))))
    assert set(stored) == set(Definition.__struct_fields__)
    assert set(stored["steps"][0]) == set(Step.__struct_fields__)
    assert None not in stored["steps"][0].values()


def test_normalising_twice_changes_nothing() -> None:
    """What is normalised says everything already."""
    assert normalise(normalise(ORDER)) == normalise(ORDER)


# -- the content's name ----------------------------------------------------------------------------


def test_the_hash_of_a_content_never_changes() -> None:
    """Sagas are pinned by it: a change here would cut every stored saga off its definition."""
    assert content_hash(ORDER) == GOLDEN
    assert Plan(ORDER).content_hash == GOLDEN


GOLDEN = "eb8423f285a661f30ea6cbc5135764d1ea4960332cb858c64d219401ebceb3d9"


def test_equal_meaning_has_an_equal_hash() -> None:
    """A default written out, another order of `after` and `uses`, a repetition: the same."""
    plain = definition(step("a"), step("b", after=[]), step("c", after=["a", "b"]))
    spelt = definition(
        step("a", after=[], uses=[], timeout_ms=10_000, retry=FORWARD_RETRY),
        step("b", after=[], compensation_retry=COMPENSATION_RETRY),
        step("c", after=["b", "a", "b"], uses=["b", "a"]),
        deadline_ms=0,
    )
    assert content_hash(plain) == content_hash(spelt)


def test_a_factor_is_a_number_however_it_is_written() -> None:
    """2 and 2.0 mean the same."""
    whole = RetryPolicy(factor=2)
    assert content_hash(definition(step("a", retry=whole))) == content_hash(definition(step("a")))


def test_other_meaning_has_another_hash() -> None:
    """Every field counts, the order of the steps too."""
    base = definition(step("a", after=[]), step("b", after=[]))
    others = [
        definition(step("a", after=[]), step("b", after=[]), name="other"),
        definition(step("a", after=[]), step("b", after=[]), deadline_ms=1),
        definition(step("a", after=[]), step("b", after=[]), retention_ms=1),
        definition(step("b", after=[]), step("a", after=[])),
        definition(step("a", after=[]), step("b")),
        definition(step("a", after=[]), step("b", Kind.READ_ONLY, after=[])),
        definition(step("a", after=[]), step("b", after=[], timeout_ms=1)),
        definition(step("a", after=[]), step("b", after=[], participant="bank")),
        definition(step("a", after=[]), step("b", after=[], action="other")),
        definition(step("a", after=[]), step("b", after=[], retry=RetryPolicy(1))),
        definition(step("a", after=[]), step("b", after=[], compensation_retry=RetryPolicy(1))),
    ]
    hashes = [content_hash(one) for one in (base, *others)]
    assert len(set(hashes)) == len(hashes)


# -- the plan --------------------------------------------------------------------------------------


def test_the_plan_of_a_diamond() -> None:
    """Who waits for whom, by number; the descendants are a bit set."""
    plan = Plan(
        definition(
            step("a"), step("b"), step("c", after=["a"]), step("d", Kind.PIVOT, after=["b", "c"])
        )
    )
    assert plan.waits_for == ((), (0,), (0,), (1, 2))
    assert plan.dependents == ((1, 2), (3,), (3,), ())
    assert plan.descendants == (0b1110, 0b1000, 0b1000, 0)
    assert plan.uses == ((), (0,), (0,), (0, 1, 2))
    assert (plan.roots, plan.pivot) == ((0,), 3)
    assert list(plan.participants) == sorted({step.participant for step in plan.steps})
    assert plan.number_of == {"a": 0, "b": 1, "c": 2, "d": 3}


def test_without_a_pivot_retriable_steps_wait_for_all_compensatable_ones() -> None:
    """Drawn or not: when the first of them is tried, everything undoable is done."""
    open_ended = definition(
        step("a"),
        step("b", after=[]),
        step("look", Kind.READ_ONLY, after=[]),
        step("r", Kind.RETRIABLE, after=[]),
        step("s", Kind.RETRIABLE, after=["r"]),
    )
    assert said(open_ended) == []
    plan = Plan(open_ended)
    assert plan.pivot is None
    assert plan.waits_for == ((), (), (), (0, 1), (0, 1, 3))
    assert plan.roots == (0, 1, 2)
    assert plan.descendants == (0b11000, 0b11000, 0, 0b10000, 0)


def test_what_it_waits_for_undrawn_it_may_use() -> None:
    """The gate before retriable steps counts as coming after: by default, and when it is named."""
    named = definition(step("a"), step("r", Kind.RETRIABLE, after=[], uses=["a"]))
    silent = definition(step("a"), step("r", Kind.RETRIABLE, after=[]))
    assert said(named) == []
    assert Plan(silent).uses == ((), (0,))
    assert content_hash(named) == content_hash(silent)


def test_with_a_pivot_nothing_is_added_to_what_is_drawn() -> None:
    """The pivot waits for all compensatable steps by rule, so retriable ones do, too."""
    plan = Plan(
        definition(
            step("a"),
            step("p", Kind.PIVOT),
            step("r", Kind.RETRIABLE),
            step("s", Kind.RETRIABLE, after=["p"]),
        )
    )
    assert plan.waits_for == ((), (0,), (1,), (1,))


@given(plans())
def test_the_plan_agrees_with_a_walk_of_the_graph(plan: Plan) -> None:
    """For any valid definition: dependents invert waits_for, descendants close over them."""
    count = len(plan.steps)
    assert violations(plan.definition) == []
    for one, other in itertools.product(range(count), repeat=2):
        assert (other in plan.dependents[one]) == (one in plan.waits_for[other])
    below = [set(plan.dependents[n]) for n in range(count)]
    for middle, one, other in itertools.product(range(count), repeat=3):
        if middle in below[one] and other in below[middle]:
            below[one].add(other)
    assert plan.descendants == tuple(sum(1 << n for n in found) for found in below)
    for number, names in enumerate(plan.uses):
        assert all(number in below[other] for other in names)
    pivot = plan.pivot
    for number, a_step in enumerate(plan.steps):
        if a_step.kind is Kind.COMPENSATABLE:
            assert not any(
                plan.steps[other].kind in {Kind.PIVOT, Kind.RETRIABLE} and number in below[other]
                for other in range(count)
            )
            assert pivot is None or pivot in below[number]


@given(plans())
def test_any_definition_survives_its_stored_form(plan: Plan) -> None:
    """Stored as msgpack or JSON and read again it is the same content with the same hash."""
    for codec in (msgspec.json, msgspec.msgpack):
        again = codec.decode(codec.encode(plan.definition), type=Definition)
        assert again == plan.definition
        assert content_hash(again) == plan.content_hash


@given(st.data())
def test_shuffled_lists_mean_the_same(data: st.DataObject) -> None:
    """The order inside `after` and `uses` says nothing."""
    plan = data.draw(plans())
    shuffled = [
        msgspec.structs.replace(
            one,
            after=tuple(data.draw(st.permutations(one.after or ()))),
            uses=tuple(data.draw(st.permutations(one.uses or ()))),
        )
        for one in plan.steps
    ]
    again = msgspec.structs.replace(plan.definition, steps=tuple(shuffled))
    assert content_hash(again) == plan.content_hash


# -- two-phase commit ------------------------------------------------------------------------------

TRANSFER = votes(step("debit"), step("credit"), step("fees"))


@pytest.mark.parametrize("two_phase", [None, TwoPhase(ordered=True), TwoPhase(locked_retries=100)])
def test_votes_without_a_graph_are_valid_and_so_is_their_normal_form(
    two_phase: TwoPhase | None,
) -> None:
    """Registered again with all defaults written out, it is the same content."""
    found = msgspec.structs.replace(TRANSFER, two_phase=two_phase)
    assert said(found) == []
    assert said(normalise(found)) == []
    assert normalise(normalise(found)) == normalise(found)
    assert content_hash(normalise(found)) == content_hash(found)


def test_votes_are_asked_for_at_once_within_half_a_minute() -> None:
    """Without settings: no order, no results handed on, one round, budgets as short as locks."""
    plan = Plan(TRANSFER)
    assert plan.two_phase == TwoPhase(ordered=False, locked_retries=0)
    assert plan.definition.deadline_ms == 30_000
    assert plan.waits_for == ((), (), ())
    assert plan.uses == ((), (), ())
    assert {step.retry for step in plan.steps} == {RetryPolicy(give_up_after_ms=300_000)}
    assert {step.compensation_retry for step in plan.steps} == {
        RetryPolicy(give_up_after_ms=300_000)
    }


def test_votes_in_order_wait_for_the_one_before_and_are_handed_all_results() -> None:
    """A branch is asked once the one before it has voted yes, with what all of them said."""
    plan = Plan(msgspec.structs.replace(TRANSFER, two_phase=TwoPhase(ordered=True)))
    assert plan.waits_for == ((), (0,), (1,))
    assert plan.uses == ((), (0,), (0, 1))


def test_each_setting_of_a_two_phase_commit_makes_another_content() -> None:
    """The mode, the order and the rounds are part of the hash; a default that is named is not."""
    settings = [None, TwoPhase(ordered=True), TwoPhase(locked_retries=1)]
    hashes = {content_hash(msgspec.structs.replace(TRANSFER, two_phase=one)) for one in settings}
    hashes.add(content_hash(msgspec.structs.replace(TRANSFER, mode=Mode.SAGA)))
    assert len(hashes) == 4
    named = msgspec.structs.replace(TRANSFER, two_phase=TwoPhase(), deadline_ms=30_000)
    assert content_hash(named) == content_hash(TRANSFER)
