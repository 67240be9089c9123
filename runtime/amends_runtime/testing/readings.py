"""Sagas as a client sees them, read from the store alone: also while no runtime is alive."""

from __future__ import annotations

from collections.abc import Mapping

import amends
from amends.saga_wire import record_from_wire, saga_from_wire
from amends_runtime import wire
from amends_runtime.actors.view import SagaView
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.records import SagaStarted
from amends_runtime.core.saga import Saga
from amends_runtime.ports import Transition
from amends_runtime.storage.memory import MemoryDisk

__all__ = ["Readings"]


class Readings:
    """Folds histories as they grow, so that a look at a saga costs only what is new."""

    def __init__(self, disk: MemoryDisk, plans: Mapping[str, Plan]) -> None:
        self._disk = disk
        self._plans = plans
        self._folded: dict[str, tuple[int, Saga]] = {}

    def saga_ids(self) -> list[str]:
        """All sagas that are durable, in the order of their start."""
        return sorted(self._disk.saga_nos, key=self._disk.saga_nos.__getitem__)

    def saga(self, saga_id: str) -> Saga:
        """The state; KeyError for a saga that is not durable."""
        turns = self._disk.history[self._disk.saga_nos[saga_id]]
        version, saga = self._folded.get(saga_id, (0, None))
        if version < len(turns):
            plan = self.plan(saga_id)
            for turn in turns[version:]:
                for record in turn.records:
                    saga = core.evolve(plan, saga, record)
            assert saga is not None, "a stored saga has at least its start"
            self._folded[saga_id] = len(turns), saga
        assert saga is not None, "a stored saga has at least its start"
        return saga

    def plan(self, saga_id: str) -> Plan:
        """The definition that a saga is pinned to."""
        return self._plans[self._disk.sagas[self._disk.saga_nos[saga_id]].definition_hash]

    def step_names(self, transition: Transition) -> tuple[str, ...]:
        """The names of the steps of the saga whose turn this is, by number."""
        first = transition.records[0]
        if isinstance(first, SagaStarted):
            return self._plans[first.definition_hash].step_names
        return self._plans[self._disk.sagas[transition.saga_no].definition_hash].step_names

    def shown(self, saga_id: str) -> amends.Saga:
        """The saga as `amends.Client.get` gives it."""
        saga = self.saga(saga_id)
        version, _ = self._folded[saga_id]
        return saga_from_wire(wire.saga_to_proto(SagaView(self.plan(saga_id), saga, version)))

    def history(self, saga_id: str) -> tuple[amends.Record, ...]:
        """Its records as `amends.Client.history` gives them."""
        plan = self.plan(saga_id)
        return tuple(
            record_from_wire(wire.record_to_proto(plan, turn.seq, turn.version, record))
            for turn in self._disk.history[self._disk.saga_nos[saga_id]]
            for record in turn.records
        )
