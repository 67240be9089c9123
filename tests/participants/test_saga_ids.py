"""Ids of sagas: RFC 9562's version 7, growing strictly within a process."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import amends
from amends.ids import COUNTER_BITS, TAIL_BITS, SagaIds

AT_MS = 0x0192_8B3C_4D5E


def test_layout_is_that_of_the_rfc() -> None:
    """Time, version, counter, variant, counter, random: each at its place, and nothing between."""
    ones = SagaIds(now_ms=lambda: AT_MS, random_bits=lambda bits: (1 << bits) - 1).next()
    assert str(ones) == "01928b3c-4d5e-77ff-bfff-ffffffffffff"
    zeros = SagaIds(now_ms=lambda: AT_MS, random_bits=lambda _: 0).next()
    assert str(zeros) == "01928b3c-4d5e-7000-8000-000000000000"
    for made in (ones, zeros):
        assert (made.version, made.variant) == (7, uuid.RFC_4122)


@pytest.mark.parametrize(
    "clock",
    [
        pytest.param([1000] * 50, id="stands still"),
        pytest.param([1000, 999, 500, 1, 0, 1000, 1001, 3], id="is put back"),
        pytest.param(list(range(1000, 1050)), id="runs"),
    ],
)
def test_ids_grow_strictly_whatever_the_clock_does(clock: list[int]) -> None:
    """Each id is greater than the one before, as a number and as text."""
    times = iter(clock)
    ids = SagaIds(now_ms=lambda: next(times))
    made = [ids.next() for _ in clock]
    assert made == sorted(set(made))
    assert list(map(str, made)) == sorted(map(str, made))


def test_a_full_counter_goes_on_in_the_next_millisecond() -> None:
    """No id repeats and none is smaller when one millisecond has used up its counter."""
    # The counter starts at its highest value but one, where in truth 2^41 ids would have gone by.
    start = (1 << COUNTER_BITS) - 2
    ids = SagaIds(
        now_ms=lambda: AT_MS, random_bits={TAIL_BITS: 0, COUNTER_BITS - 1: start}.__getitem__
    )
    first, second, third = ids.next(), ids.next(), ids.next()
    assert first < second < third
    assert [made.int >> 80 for made in (first, second, third)] == [AT_MS, AT_MS, AT_MS + 1]


def test_threads_never_get_the_same_id() -> None:
    """Clients in several threads share the source."""
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: amends.new_saga_id(), range(4000)))
    assert len(set(made)) == len(made)


def test_a_saga_id_is_one_that_the_runtime_takes() -> None:
    """36 characters of lower-case hex and hyphens, of version 7."""
    made = amends.new_saga_id()
    assert str(uuid.UUID(made)) == made
    assert uuid.UUID(made).version == 7
