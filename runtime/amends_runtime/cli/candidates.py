"""What a shell offers for names that only the runtime knows: ids, definitions, participants.

Asked while somebody presses the tab key: whatever goes wrong, nothing is offered and nothing said.
"""

# ruff: noqa: PLC0415  # what is heavy is imported when it is needed, not by help

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from amends_runtime.cli.options import Common

if TYPE_CHECKING:
    from cyclopts.completion import CompletionContext

    import amends

__all__ = ["added_participants", "definitions", "saga_ids"]

Candidates = dict[str, str]
"""Candidates, each with a word about it."""

PATIENCE_S: Final = 2.0  # longer than this nobody waits for a suggestion
MOST: Final = 50  # the newest; more of them is not a suggestion but a list
MOST_LOOKED_AT: Final = 10_000  # for what begins as it is typed: ten pages, half a second


def saga_ids(*states: str) -> Callable[[CompletionContext], Candidates]:
    """Ids of sagas in one of these states, by default in any, which begin with what is typed.

    The newest ones, among as many of the newest as can be looked through in that time.
    """

    def completer(context: CompletionContext) -> Candidates:
        typed = context.incomplete
        matching: Candidates = {}

        async def found(client: amends.Client) -> Candidates:
            from amends.sagas import SagaState

            wanted = [SagaState(state) for state in states] or None
            # The runtime has no filter for the beginnings of ids.
            async for saga in client.list(state=wanted, limit=MOST_LOOKED_AT if typed else MOST):
                if saga.saga_id.startswith(typed):
                    matching[saga.saga_id] = f"{saga.definition} {saga.state}"
                    if len(matching) == MOST:
                        break
            return matching

        return _ask(context, found) or matching

    return completer


def definitions(context: CompletionContext) -> Candidates:
    """Names of registered definitions."""

    async def found(client: amends.Client) -> Candidates:
        return {each.name: f"version {each.version}" for each in await client.definitions()}

    return _ask(context, found)


def added_participants(context: CompletionContext) -> Candidates:
    """Names of the participants that an operator has added or re-pointed."""

    async def found(client: amends.Client) -> Candidates:
        return {each.name: each.address for each in await client.participants() if each.by_operator}

    return _ask(context, found)


def _ask(
    context: CompletionContext, found: Callable[[amends.Client], Awaitable[Candidates]]
) -> Candidates:
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.exits import Exit

    given: dict[str, Any] = {}
    for name in ("target", "tls_ca", "tls_cert", "tls_key", "tls_server_name"):
        argument = context.get(f"--{name.replace('_', '-')}")
        if argument is not None and argument.provided:
            given[name] = argument.value

    async def ask() -> Candidates:
        async with asyncio.timeout(PATIENCE_S), connect(Common(**given)) as client:
            return await found(client)

    try:
        return asyncio.run(ask())
    except (Exit, TimeoutError):
        return {}
