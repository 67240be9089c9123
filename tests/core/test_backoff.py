"""Backoff: how long a retry waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from amends_runtime.core.backoff import backoff_ms
from amends_runtime.core.definition import RetryPolicy
from amends_runtime.core.records import Verb

POLICY = RetryPolicy(first_ms=100, factor=2.0, max_ms=30_000)

POLICIES = st.builds(
    RetryPolicy,
    first_ms=st.integers(1, 10**9),
    factor=st.floats(1.0, 100.0),
    max_ms=st.integers(1, 10**12),
)


def wait_ms(
    failures: int,
    *,
    saga_id: str = "s-1",
    step: int = 0,
    verb: Verb = Verb.EXECUTE,
    round_: int = 1,
    attempt: int = 1,
    policy: RetryPolicy = POLICY,
) -> int:
    """The wait after so many failures."""
    return backoff_ms(policy, failures, saga_id, step, verb, round_, attempt)


@given(POLICIES, st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_wait_lies_between_a_millisecond_and_its_bound(
    policy: RetryPolicy, failures: int, attempt: int
) -> None:
    """Whatever the policy and however many failures: no wait of 0, none above the maximum."""
    assert 1 <= wait_ms(failures, attempt=attempt, policy=policy) <= policy.max_ms


def test_the_bound_grows_by_the_factor_up_to_the_maximum() -> None:
    """100, 200, 400 ms and so on until 30 s; the largest of many waits comes close to its bound."""
    for failures, bound in [(1, 100), (2, 200), (3, 400), (9, 25_600), (10, 30_000), (60, 30_000)]:
        waits = [wait_ms(failures, saga_id=f"s-{n}") for n in range(2_000)]
        assert bound * 0.99 < max(waits) <= bound
        assert min(waits) < bound * 0.01 + 2


def test_jitter_is_full() -> None:
    """Waits are spread evenly: each tenth of the interval gets its tenth of the sagas."""
    waits = [wait_ms(10, saga_id=f"s-{n}") for n in range(10_000)]
    for tenth in range(10):
        low, high = tenth * 3_000, (tenth + 1) * 3_000
        # 1,000 expected with a standard deviation of 30: five of them, and the dice are fixed
        assert 850 < sum(low < wait <= high for wait in waits) < 1_150


def test_the_same_attempt_always_waits_the_same() -> None:
    """There is no chance in it: every node, every replay, every release comes to this figure."""
    assert [wait_ms(10, attempt=attempt) for attempt in range(1, 6)] == GOLDEN


GOLDEN = [19213, 15025, 21928, 5697, 27453]


def test_whatever_identifies_an_attempt_throws_the_dice_anew() -> None:
    """Other saga, step, verb, round or attempt: another wait."""
    waits = {
        wait_ms(10),
        wait_ms(10, saga_id="s-2"),
        wait_ms(10, step=1),
        wait_ms(10, verb=Verb.COMPENSATE),
        wait_ms(10, round_=2),
        wait_ms(10, attempt=2),
    }
    assert len(waits) == 6


def test_growth_beyond_all_numbers_is_the_maximum() -> None:
    """A factor of 100 after a thousand failures is no number any more, and still a wait."""
    steep = RetryPolicy(first_ms=10**9, factor=100.0, max_ms=5)
    for failures in (154, 155, 1_000):
        assert 1 <= wait_ms(failures, policy=steep) <= 5
