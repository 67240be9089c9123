"""The registered definitions, held in memory as they are stored.

There are few, and every row of a saga names one by its number: so they are read once at each
opening and after each registration, and nothing else asks the database for them.
"""

from __future__ import annotations

import aiosqlite

from amends_runtime.ports import RegisteredDefinition
from amends_runtime.storage.codec import decode_definition
from amends_runtime.storage.queries import read_queries

__all__ = ["StoredDefinitions"]

_SQL = read_queries("sqlite")


class StoredDefinitions:
    """All of them, by number and by content."""

    def __init__(self) -> None:
        self.by_no: dict[int, RegisteredDefinition] = {}
        self.nos: dict[str, int] = {}
        """Their numbers, by the hash of their content."""

    async def read(self, connection: aiosqlite.Connection) -> None:
        """Reads them, all anew."""
        rows = await connection.execute_fetchall(_SQL["definitions"])
        self.by_no = {
            definition_no: RegisteredDefinition(
                decode_definition(hashed, content), hashed, version, registered_at_ms, activated
            )
            for definition_no, version, hashed, content, registered_at_ms, activated in rows
        }
        self.nos = {
            registered.content_hash: definition_no
            for definition_no, registered in self.by_no.items()
        }

    def find(self, content_hash: str) -> RegisteredDefinition | None:
        """The one of this content, if it is registered."""
        return self.by_no.get(self.nos.get(content_hash, 0))

    def is_latest(self, registered: RegisteredDefinition) -> bool:
        """Whether it is the one of its name that new sagas get."""
        return registered.activated == max(
            other.activated
            for other in self.by_no.values()
            if other.definition.name == registered.definition.name
        )

    def in_order(self) -> list[RegisteredDefinition]:
        """All of them, by name and version."""
        return sorted(
            self.by_no.values(),
            key=lambda registered: (registered.definition.name, registered.version),
        )
