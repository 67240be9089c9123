"""The room for starts in flight, by itself: it becomes what a runtime takes, and grows again."""

from __future__ import annotations

from amends.room import FEWEST_STARTS, MAX_REQUESTS, MAX_STARTS, Room


def test_an_empty_room_has_place_for_full_requests() -> None:
    """As many of them as may be in flight, and then for none."""
    room = Room()
    for _ in range(MAX_REQUESTS):
        assert room.left == MAX_STARTS
        assert room.is_worth_a_request
        room.take(MAX_STARTS)
    assert room.left == 0
    assert not room.is_worth_a_request


def test_what_is_refused_leaves_what_was_taken() -> None:
    """Also where there was room for far more than was asked for."""
    room = Room()
    room.give_back(room.take(200), refused=190)
    assert room.left == 10


def test_requests_of_a_larger_room_make_it_smaller_once() -> None:
    """Those that had left before the first refusal tell nothing new."""
    room = Room()
    places = [room.take(MAX_STARTS) for _ in range(MAX_REQUESTS)]
    room.give_back(places[0], refused=600)
    for place in places[1:]:
        room.give_back(place, refused=MAX_STARTS)
    assert room.left == MAX_STARTS
    room.take(MAX_STARTS)
    room.take(MAX_STARTS)
    room.take(MAX_STARTS)
    assert room.left == MAX_REQUESTS * MAX_STARTS - 600 - 3 * MAX_STARTS


def test_there_is_always_room_for_a_few() -> None:
    """Or nobody would see that the runtime takes starts again."""
    room = Room()
    room.give_back(room.take(50), refused=50)
    assert room.left == FEWEST_STARTS


def test_only_who_filled_the_room_makes_it_larger() -> None:
    """A small request that is taken whole does not say that a large one would be."""
    room = Room()
    room.give_back(room.take(200), refused=100)
    room.give_back(room.take(60), refused=0)
    assert room.left == 100
    room.give_back(room.take(100), refused=0)
    assert room.left == 125
    room.give_back(room.take(125), refused=None)
    assert room.left == 125


def test_a_remainder_of_the_room_is_no_request() -> None:
    """A quarter of it is."""
    room = Room()
    room.give_back(room.take(200), refused=100)
    room.take(76)
    assert not room.is_worth_a_request
    other = Room()
    other.give_back(other.take(200), refused=100)
    other.take(75)
    assert other.is_worth_a_request
