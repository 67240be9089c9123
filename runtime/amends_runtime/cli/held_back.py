"""What is said beside two-phase commits while nobody has confirmed the restored store of theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amends_runtime.cli.tables import print_line

if TYPE_CHECKING:
    import amends
    from amends_runtime.cli.options import Common

__all__ = ["note_held_back"]


async def note_held_back(client: amends.Client, common: Common) -> None:
    """Says below a table that those from before the restore stand still, if that is so."""
    if common.output != "table" or not (await client.runtime()).restored:
        return
    print_line()
    print_line(
        "This store was restored, and nobody has confirmed it: two-phase commits from before that "
        "are held back. amends confirm-restore --help says more."
    )
