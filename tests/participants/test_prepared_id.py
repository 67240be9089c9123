"""The names of prepared transactions: one for each vote, and all that is told of it."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amends import Verb
from amends.barrier.prepared_id import MAX_BYTES, PREFIX, GlobalId, VoteLife
from amends.wire import call_from_wire
from tests.participants.asking import call_message

texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("|~%=/.:-_'\\"), max_size=40
)
stores = texts | st.uuids().map(str) | st.uuids().map(lambda number: number.hex)
lives = st.builds(VoteLife, stores, texts, texts, st.integers(1, 2**31 - 1))
ids = st.builds(GlobalId, lives, stores, st.from_regex(r"[A-Za-z0-9_-]{8}", fullmatch=True))


@given(ids)
def test_a_name_says_whose_vote_it_is(name: GlobalId) -> None:
    """All of it can be read back, whatever the ids are made of."""
    assert GlobalId.parse(str(name)) == name


@given(ids)
def test_a_name_needs_no_quoting(name: GlobalId) -> None:
    """It stands in statements that take no parameters: nothing in it ends the literal."""
    literal = name.literal
    assert literal == f"'{name}'"
    assert literal.isascii()
    assert not set("'\\\"\0\n ") & set(literal[1:-1])


@given(ids, ids)
def test_two_votes_never_have_one_name(one: GlobalId, other: GlobalId) -> None:
    """Nor does a name begin as those of another life do."""
    assert (str(one) == str(other)) == (one == other)
    assert str(one).startswith(other.life.prefix) == (one.life == other.life)


def test_a_round_s_names_do_not_begin_as_those_of_its_tenth() -> None:
    """Who looks for what is prepared of the first finds nothing of the tenth."""
    first, tenth = (VoteLife("store", "saga", "step", number) for number in (1, 10))
    name = str(GlobalId(tenth, "incarnation", "AAAAAAAA"))
    assert name.startswith(tenth.prefix)
    assert not name.startswith(first.prefix)


@given(st.text() | st.text().map(lambda rest: PREFIX + rest))
def test_other_peoples_names_are_not_ours(text: str) -> None:
    """Whatever is listed beside ours is left alone; what is read as ours is written like that."""
    name = GlobalId.parse(text)
    assert name is None or name.literal == f"'{text}'"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "amends1",
        "amends1|||||||",
        "amends2|~s|saga|step|1|~i|AAAAAAAA",
        "amends1|~s|saga|step|01|~i|AAAAAAAA",
        "amends1|~s|saga|step|1_0|~i|AAAAAAAA",
        "amends1|~s|sa%67a|step|1|~i|AAAAAAAA",
        "amends1|not-a-uuid|saga|step|1|~i|AAAAAAAA",
        "amends1|~s|saga|step|1|~i|'; --AAA",
        "my transfer",
    ],
)
def test_what_we_would_write_otherwise_is_not_ours(text: str) -> None:
    """A name is ours only if it is exactly as we write it."""
    assert GlobalId.parse(text) is None


def test_a_name_of_a_runtime_is_short_and_legible() -> None:
    """A runtime's ids are UUIDs: saga and step can be read, and there is room for longer ones."""
    store, incarnation = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
    call = call_message(Verb.PREPARE, saga_id="transfer-7", step="debit", store_id=store)
    call.incarnation = incarnation
    name = GlobalId.of(call_from_wire(call))
    head, request = str(name).rsplit("|", 1)
    assert head == "amends1|AAAAAAAAAAAAAAAAAAAAAQ|transfer-7|debit|1|AAAAAAAAAAAAAAAAAAAAAg"
    assert len(request) == 8
    assert name.fits


@pytest.mark.parametrize(("characters", "fits"), [(133, True), (134, False)])
def test_how_long_ids_may_be(characters: int, fits: bool) -> None:  # noqa: FBT001
    """With UUIDs, saga, step and the round's digits have 134 characters; PostgreSQL takes 199."""
    store, incarnation = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
    life = VoteLife(store, "s" * (characters - 40), "t" * 40, 1)
    name = GlobalId(life, incarnation, "AAAAAAAA")
    assert name.fits is fits
    assert (len(str(name)) <= MAX_BYTES) is fits


@given(lives, lives)
def test_each_life_has_a_lock_of_its_own(one: VoteLife, other: VoteLife) -> None:
    """A signed number of 64 bits, which PostgreSQL's advisory locks take."""
    assert -(2**63) <= one.lock < 2**63
    assert (one.lock == other.lock) == (one == other)


def test_the_request_is_part_of_the_name() -> None:
    """So a repeated vote is told from another one under the same key."""
    first = GlobalId.of(call_from_wire(call_message(Verb.PREPARE)))
    assert GlobalId.of(call_from_wire(call_message(Verb.PREPARE, attempt=2))) == first
    changed = GlobalId.of(call_from_wire(call_message(Verb.PREPARE, amount=6)))
    assert changed.life == first.life
    assert changed != first
