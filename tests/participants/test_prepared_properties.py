"""Any order of calls, repeats, lost replies and lost connections, against a model of five lines."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amends import BarrierError, Done, Heuristic, InProgress, Verb
from amends.outcomes import Outcome
from tests.participants.branch import Branch
from tests.participants.cutting import Relay, relay
from tests.participants.test_prepared import behind
from tests.postgres import Postgres

P, E, C = Verb.PREPARE, Verb.EXECUTE, Verb.COMPENSATE

RULES = {
    # what there is: what each verb is answered with, and what there is then
    "nothing": {P: ("Done", "prepared"), E: ("Broken", "lost"), C: ("Done", "aborted")},
    "prepared": {P: ("Done", "prepared"), E: ("Done", "yes"), C: ("Done", "aborted")},
    "yes": {P: ("Done", "yes"), E: ("Done", "yes"), C: ("Heuristic", "yes")},
    "no": {P: ("Rejected", "no"), E: ("Broken", "no"), C: ("Done", "no")},
    "aborted": {P: ("Rejected", "aborted"), E: ("Rejected", "aborted"), C: ("Done", "aborted")},
    "lost": {P: ("Rejected", "lost"), E: ("Broken", "lost"), C: ("Done", "lost")},
}

COMMANDS = {P: "PREPARE TRANSACTION", E: "COMMIT PREPARED", C: "ROLLBACK PREPARED"}


@dataclass
class World:
    """A branch in two processes' worth of barriers, one of them behind a wire that can be cut."""

    runner: asyncio.Runner
    postgres: Postgres
    one: Branch
    other: Branch
    wire: Relay
    numbers: Iterator[int]

    def next_saga(self) -> str:
        """Give an id that nobody has used."""
        return f"transfer-{next(self.numbers)}"

    async def ask(self, branch: Branch, verb: Verb, saga_id: str, amount: int = 1) -> Outcome:
        """Ask until it is decided."""
        while True:
            try:
                outcome = await branch.ask(verb, saga_id=saga_id, amount=amount)
            except BarrierError:
                continue  # its connections were lost, by now it knows
            if not isinstance(outcome, InProgress):
                return outcome

    def end_connections(self) -> None:
        """End all connections of both barriers, as a participant that is killed does."""
        self.postgres.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    def state(self, saga_id: str) -> str:
        """Say what there is of a saga."""
        for seen, state in self.one.rows:
            if seen == saga_id:
                return state
        return "prepared" if any(f"|{saga_id}|" in gid for gid in self.one.listed) else "nothing"


@pytest.fixture
def world(postgres: Postgres) -> Iterator[World]:
    """Open both barriers for all examples of a test; each has a saga of its own."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def enter() -> World:
            wire = await stack.enter_async_context(relay(postgres.server.port))
            one = Branch(behind(postgres, wire.port))
            other = Branch(postgres, "psycopg")
            await stack.enter_async_context(one.barrier)
            await stack.enter_async_context(other.barrier)
            return World(runner, postgres, one, other, wire, itertools.count())

        world = runner.run(enter())
        postgres.execute("UPDATE accounts SET cents = 1000000")
        yield world
        runner.run(stack.aclose())


examples = settings(
    max_examples=settings().max_examples // 8,  # each is some dozens of commits
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

steps = st.tuples(st.sampled_from([P, E, C]), st.sampled_from(["", "other", "lost", "ended"]))


@examples
@given(st.booleans(), st.lists(steps, min_size=1, max_size=7))
def test_every_order_is_answered_by_the_rules(
    world: World,
    refuses: bool,  # noqa: FBT001
    order: list[tuple[Verb, str]],
) -> None:
    """One call after another, each by a process of two, its reply or its connections lost."""
    saga_id = world.next_saga()
    before, state = world.one.cents, "nothing"
    amount = 10_000_000 if refuses else 1
    for verb, how in order:
        branch = world.other if how == "other" else world.one
        if how == "ended":
            world.end_connections()
        if how == "lost":
            world.wire.cut(COMMANDS[verb])
        answer, after = RULES[state][verb]
        if (state, verb, refuses) == ("nothing", P, True):
            answer, after = "Rejected", "no"
        outcome = world.runner.run(world.ask(branch, verb, saga_id, amount))
        if how == "lost":
            world.wire.cut("")
        assert type(outcome).__name__ == answer
        state = after
        assert world.state(saga_id) == state
        assert before - world.one.cents == (1 if state == "yes" else 0)
    world.runner.run(world.ask(world.one, C, saga_id))
    assert world.one.listed == []


@examples
@given(st.lists(st.sampled_from([P, P, C]), min_size=2, max_size=5), st.booleans())
def test_votes_and_an_abort_at_the_same_time(
    world: World,
    verbs: list[Verb],
    ends: bool,  # noqa: FBT001
) -> None:
    """However they meet, in two processes: once Compensate is done nothing is held, or ever is."""
    saga_id = world.next_saga()
    before = world.one.cents

    async def all_at_once() -> None:
        branches = itertools.cycle([world.one, world.other])
        asked = [
            asyncio.ensure_future(branch.ask(verb, saga_id=saga_id, amount=1))
            for verb, branch in zip(verbs, branches, strict=False)
        ]
        if ends:
            await asyncio.to_thread(world.end_connections)
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert not isinstance(outcome, Heuristic)
        assert isinstance(await world.ask(world.other, C, saga_id), Done)

    world.runner.run(all_at_once())
    assert world.state(saga_id) == "aborted"
    outcome = world.runner.run(world.ask(world.one, P, saga_id))
    assert type(outcome).__name__ == "Rejected"
    assert (world.one.listed, world.one.cents) == ([], before)


@examples
@given(st.lists(st.sampled_from([P, E, E]), min_size=2, max_size=5), st.booleans())
def test_commits_and_late_votes_at_the_same_time(
    world: World,
    verbs: list[Verb],
    ends: bool,  # noqa: FBT001
) -> None:
    """Once voted, the effect is there once, whoever repeats what; nobody is told it is lost."""
    saga_id = world.next_saga()
    before = world.one.cents

    async def all_at_once() -> None:
        assert isinstance(await world.ask(world.one, P, saga_id), Done)
        branches = itertools.cycle([world.one, world.other])
        asked = [
            asyncio.ensure_future(branch.ask(verb, saga_id=saga_id, amount=1))
            for verb, branch in zip(verbs, branches, strict=False)
        ]
        if ends:
            await asyncio.to_thread(world.end_connections)
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, Done | InProgress | BarrierError)
        assert isinstance(await world.ask(world.other, E, saga_id), Done)

    world.runner.run(all_at_once())
    assert world.state(saga_id) == "yes"
    assert (world.one.listed, world.one.cents) == ([], before - 1)
