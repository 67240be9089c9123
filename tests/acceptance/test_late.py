"""A call that arrives after its own compensation, as in a network it may: the fence refuses it."""

from __future__ import annotations

from pathlib import Path

import amends
from amends import SagaState
from tests.acceptance import odd
from tests.acceptance.world import runtime_of, shop_in

SHORT = amends.Retry(first_s=0.01, max_s=0.02, give_up_after_s=0.03)


async def test_a_charge_arrives_after_its_refund(tmp_path: Path) -> None:
    """The runtime gave it up and had it undone; what comes then is refused, and nobody pays."""
    async with shop_in(tmp_path) as (processes, services):
        late = odd.LateParticipant(services["payments"].address)
        async with (
            odd.serving(late, odd.CONTRACT) as address,
            runtime_of(processes, services, {"late-payments": address}) as world,
        ):
            await world.client.register(
                amends.Definition("order-late")
                .step("place", "orders", "place")
                .step("charge", "late-payments", "charge", retry=SHORT)
            )
            started = await world.start("order-late")

            ended = await world.end(started)

            assert ended.state is SagaState.COMPENSATED
            assert late.outcomes
            assert {outcome.WhichOneof("outcome") for outcome in late.outcomes} == {"rejected"}
            assert {outcome.rejected.reason for outcome in late.outcomes} == {"fenced"}
            assert world.effects(started.saga_id) == ["place", "cancel"]
