"""Operators who point participants elsewhere, over connections that break with their runtime.

Every address leads to the same participant: what is at stake is that the lanes follow, that no call
is lost on the way, and that what an operator was told of stands.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec

from amends_runtime.errors import AmendsError
from tests.simulation.flows import flow, step
from tests.simulation.network import configured
from tests.simulation.runtime import Process

if TYPE_CHECKING:
    from amends_runtime.actors.supervisor import Supervisor
    from tests.simulation.world import World

__all__ = ["Operators"]

BACK = 0.3  # how often a participant is not moved, but given back to the configuration
AGAIN_S = 0.1


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
        self._unanswered = 0
        self.away_until_s = 0.0  # when the last participant comes back that went at work
        self._registered: dict[str, bool] = {}  # definitions, and whether that was acknowledged

    def move(self, process: Process, name: str) -> None:
        """Ask a runtime to find a participant elsewhere from now on, or where it is configured."""
        back = self._world.faults.between(0.0, 1.0) < BACK
        if back and name not in self._world.schedule.by_hand:
            _ = self.remove(process, name)
        else:
            _ = self.put(process, name)

    def remove(self, process: Process, name: str) -> asyncio.Future[None]:
        """Ask a runtime to take back what an operator registered; give the answer to come."""
        return self._ask(process, name, "")

    def put(self, process: Process, name: str) -> asyncio.Future[None]:
        """Ask a runtime to find a participant at a new address; give the answer to come."""
        return self._ask(process, name, f"{configured(name).address}/{len(self._moves)}")

    async def bring_back(self) -> None:
        """Register what is not in the configuration and was removed, until it is there."""
        world = self._world
        await anyio.sleep(max(0.0, self.away_until_s - world.now_s()))
        for name in world.schedule.by_hand:
            while self._unanswered or name not in world.disk.participants:
                process = world.deployment.current
                if process is not None and process.is_serving and not self._unanswered:
                    with contextlib.suppress(AmendsError):
                        await self.put(process, name)
                await anyio.sleep(AGAIN_S)

    def register(self, process: Process) -> None:
        """Ask a runtime to register a definition that it does not know yet."""
        name = f"new-{len(self._registered)}"
        self._registered[name] = False

        async def ask(_: Supervisor) -> None:
            participants = process.engine.lanes.names()
            if participants:
                definition = flow(name, step("a", participants[0])).definition
                await process.engine.definitions.register(definition)
                self._registered[name] = True

        process.handle(ask).add_done_callback(_look_at, context=self._world.context)

    def _ask(self, process: Process, name: str, address: str) -> asyncio.Future[None]:
        move = _Move(name, address)
        self._moves.append(move)
        self._unanswered += 1

        async def ask(_: Supervisor) -> None:
            participants = process.engine.participants
            if move.address:
                await participants.put(name, move.address, "test", "test")
            else:
                await participants.remove(name, "test", "test")

        reply = process.handle(ask)
        reply.add_done_callback(partial(self._answered, move), context=self._world.context)
        return reply

    def _answered(self, move: _Move, reply: asyncio.Future[None]) -> None:
        self._unanswered -= 1
        move.acknowledged = reply.exception() is None
        if move.acknowledged:
            self._world.trace.add("operator: {} is at {}", move.name, move.address or "home")

    def check(self) -> None:
        """The last move that was acknowledged stands, or one after it; and the lane is there.

        So does every definition whose registration was acknowledged.
        """
        process = self._world.deployment.current
        assert process is not None, "a runtime is up when all is quiet"
        known = {held.definition.name for held in self._world.disk.definitions.values()}
        for name, acknowledged in self._registered.items():
            if acknowledged and name not in known:
                self._world.violation("an acknowledged registration stands", name)
        for name in self._world.participants:
            held = self._world.disk.participants.get(name)
            stored = "" if held is None else held.address
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
        if name in self._world.schedule.by_hand:
            possible = {configured(name).address}
        for move in self._moves:
            if move.name == name:
                possible = {move.address} if move.acknowledged else {*possible, move.address}
        return possible


def _look_at(reply: asyncio.Future[None]) -> None:
    """Nobody else hears of what it was answered, which asyncio would complain of."""
    reply.exception()
