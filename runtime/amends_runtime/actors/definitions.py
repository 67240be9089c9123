"""The registered definitions, and the plans that are worked out of them.

All of them are in memory: there are few, they never change, and every start and every revival
needs one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection

from amends_runtime.core.definition import Definition, Plan, normalise, violations
from amends_runtime.errors import FieldViolation, InvalidRequest, NotFound
from amends_runtime.ports import Clock, RegisteredDefinition, Store

__all__ = ["Definitions"]


class Definitions:
    """Registers definitions and finds them. `participants` names those that are registered now."""

    def __init__(
        self, store: Store, clock: Clock, participants: Callable[[], Collection[str]]
    ) -> None:
        self._store = store
        self._clock = clock
        self._participants = participants
        self._by_name: dict[str, dict[str, RegisteredDefinition]] = {}
        self._latest: dict[str, RegisteredDefinition] = {}
        self._plans: dict[str, Plan] = {}

    async def load(self) -> None:
        """Reads what was registered before. Comes before anything else."""
        for registered in await self._store.definitions():
            self._add(registered)

    async def register(self, definition: Definition) -> tuple[RegisteredDefinition, bool]:
        """Registers a definition, durably. The answer's second part: this content was there before.

        Raises InvalidRequest with every violation at once; nothing is stored then.
        """
        found = violations(definition, self._participants())
        if found:
            raise InvalidRequest(
                "INVALID_DEFINITION",
                [FieldViolation(f"definition.{v.field}", v.message) for v in found],
                {"definition": definition.name[:64], "violations": str(len(found))},
            )
        registered, existed = await self._store.put_definition(
            normalise(definition), self._clock.now_ms()
        )
        self._add(registered)
        return registered, existed

    def find(self, name: str, content_hash: str = "") -> RegisteredDefinition:
        """The version with this hash, or the latest. Raises NotFound, with the nearest name."""
        versions = self._by_name.get(name)
        if versions is None:
            near = difflib.get_close_matches(name, self._by_name, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else "register it first: amends definitions register FILE"
            )
            raise NotFound(
                "UNKNOWN_DEFINITION",
                f"there is no definition {name[:64]!r}; {hint}",
                {"definition": name[:64]},
            )
        if not content_hash:
            return self._latest[name]
        if content_hash not in versions:
            raise NotFound(
                "UNKNOWN_DEFINITION_VERSION",
                f"definition {name!r} has no content {content_hash[:64]!r};"
                f" its versions: amends definitions get {name}",
                {"definition": name, "definition_hash": content_hash[:64]},
            )
        return versions[content_hash]

    def all(self) -> list[RegisteredDefinition]:
        """Every version of every definition, by name and version."""
        return sorted(
            (r for versions in self._by_name.values() for r in versions.values()),
            key=lambda registered: (registered.definition.name, registered.version),
        )

    def two_phase(self) -> set[str]:
        """The hashes of those that are two-phase commits."""
        return {hashed for hashed, plan in self._plans.items() if plan.two_phase is not None}

    def is_latest(self, registered: RegisteredDefinition) -> bool:
        """Whether a start that names no version gets this one."""
        latest = self.find(registered.definition.name)
        return latest.content_hash == registered.content_hash

    def unregistered(self, plan: Plan) -> list[str]:
        """Participants of the plan that are not registered (any more), by name."""
        registered = self._participants()
        return [name for name in plan.participants if name not in registered]

    def plan(self, content_hash: str) -> Plan:
        """The plan that a saga is pinned to.

        KeyError: the store lost a definition, which no start survives.
        """
        return self._plans[content_hash]

    def _add(self, registered: RegisteredDefinition) -> None:
        name = registered.definition.name
        versions = self._by_name.setdefault(name, {})
        versions[registered.content_hash] = registered
        self._latest[name] = max(versions.values(), key=lambda version: version.activated)
        if registered.content_hash not in self._plans:
            self._plans[registered.content_hash] = Plan(registered.definition)
