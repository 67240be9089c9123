"""How long to wait before the next attempt: capped exponential, full jitter, no chance.

Full jitter (M. Brooker, "Exponential Backoff And Jitter", 2015) spreads the retries of many sagas
over the whole interval. The dice are a hash of what is being retried, so the same history always
waits the same time, on every node and in every replay.
"""

from __future__ import annotations

import hashlib

from amends_runtime.core.definition import RetryPolicy
from amends_runtime.core.records import Verb

__all__ = ["backoff_ms"]


def backoff_ms(  # noqa: PLR0917 - what identifies an attempt, in the order of its key
    policy: RetryPolicy,
    failures: int,
    saga_id: str,
    step: int,
    verb: Verb,
    round_: int,
    attempt: int,
) -> int:
    """Milliseconds from 1 to the bound after `failures` (at least 1) failed attempts running."""
    try:
        bound = min(policy.max_ms, int(policy.first_ms * policy.factor ** (failures - 1)))
    except OverflowError:
        bound = policy.max_ms
    dice = hashlib.blake2b(
        f"{saga_id}/{step}/{verb:d}/{round_}/{attempt}".encode(), digest_size=8
    ).digest()
    return 1 + int.from_bytes(dice, "big") % max(1, bound)
