"""The order saga.

::

    place ──┬── charge ───┬── ship ── confirm
            └── reserve ──┘   (pivot)

Until the parcel is handed over everything can be undone; from then on the order is confirmed,
however often that has to be tried.
"""

from __future__ import annotations

from typing import Final

import amends

_RETRY: Final = amends.Retry(first_s=0.1, factor=2, max_s=2)
"""As by default, but somebody watches: no wait is longer than two seconds."""

_TIMEOUT_S: Final = 3
"""A hundred times what the services take. It is also how long an attempt that was on the wire when
the runtime died holds up its own undoing: until then it may still be running."""

order: Final = (
    amends.Definition("order")
    .step(
        "place",
        "orders",
        "place",
        timeout_s=_TIMEOUT_S,
        retry=_RETRY,
        compensation_retry=_RETRY,
    )
    .step(
        "charge",
        "payments",
        "charge",
        after=["place"],
        timeout_s=_TIMEOUT_S,
        retry=_RETRY,
        compensation_retry=_RETRY,
    )
    .step(
        "reserve",
        "inventory",
        "reserve",
        after=["place"],
        timeout_s=_TIMEOUT_S,
        retry=_RETRY,
        compensation_retry=_RETRY,
    )
    .pivot(
        "ship",
        "shipping",
        "ship",
        after=["charge", "reserve"],
        timeout_s=_TIMEOUT_S,
        retry=_RETRY,
    )
    .retriable("confirm", "orders", "confirm", timeout_s=_TIMEOUT_S, retry=_RETRY)
)
