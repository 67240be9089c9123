"""Operators who point participants elsewhere, over connections that break with their runtime.

Every address leads to the same participant: what is at stake is that the lanes follow, that no call
is lost on the way, and that what an operator was told of stands.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from tests.simulation.network import configured
from tests.simulation.runtime import Process

if TYPE_CHECKING:
    from amends_runtime.actors.supervisor import Supervisor
    from tests.simulation.world import World

__all__ = ["Operators"]

BACK = 0.3  # how often a participant is not moved, but given back to the configuration


class _Move(msgspec.Struct):
    """One request. An empty address gives the participant back to the configuration."""

    name: str
    address: str
    acknowledged: bool = False


class Operators:
    """All that was asked, in its order, and what was answered."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._moves: list[_Move] = []

    def move(self, process: Process, name: str) -> None:
        """Ask a runtime to find a participant elsewhere from now on, or where it is configured."""
        back = self._world.faults.between(0.0, 1.0) < BACK
        address = "" if back else f"{configured(name).address}/{len(self._moves)}"
        move = _Move(name, address)
        self._moves.append(move)

        async def ask(_: Supervisor) -> None:
            participants = process.engine.participants
            if move.address:
                await participants.put(name, move.address, "test", "test")
            else:
                await participants.remove(name, "test", "test")

        process.handle(ask).add_done_callback(
            partial(self._answered, move), context=self._world.context
        )

    def _answered(self, move: _Move, reply: asyncio.Future[None]) -> None:
        move.acknowledged = reply.exception() is None
        if move.acknowledged:
            self._world.trace.add("operator: {} is at {}", move.name, move.address or "home")

    def check(self) -> None:
        """The last move that was acknowledged stands, or one after it; and the lane is there."""
        process = self._world.deployment.current
        assert process is not None, "a runtime is up when all is quiet"
        for name in self._world.participants:
            stored = self._world.disk.participants.get(name, "")
            if stored not in self._possible(name):
                self._world.violation(
                    "an acknowledged registration stands", f"{name} is held at {stored!r}"
                )
            wanted = stored or configured(name).address
            found = process.engine.lanes.of(name).address.address
            if found != wanted:
                self._world.violation(
                    "a lane leads where the store says", f"{name} is at {wanted}, its lane {found}"
                )

    def _possible(self, name: str) -> set[str]:
        """Where a participant may be held: a move without an answer may have happened."""
        possible = {""}
        for move in self._moves:
            if move.name == name:
                possible = {move.address} if move.acknowledged else {*possible, move.address}
        return possible
