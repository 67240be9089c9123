"""A participant's part in two-phase commits: what it holds, how it votes, and how it breaks a vote.

How to think about it. A branch is an amount that an account of this participant is to have more.
Its vote takes the account's lock, in the transaction that also writes the barrier's row; whoever
else wants the account meanwhile is told LOCKED, at once. The commit adds the amount and lets go of
the lock, the roll back lets go of it.

Who holds a lock may ask the runtime for the decision, at any time, and carries out what it is told
like a call of the runtime's; the runtime's own call comes before it or after it. Whom it asks may
have been replaced and not know it yet.

A vote is broken in three ways: what was voted for is lost with its row, as by a restore of the
database; somebody decides alone; or the branch refuses to commit. They are planted, counted apart,
and the only excuse for MIXED.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from amends.outcomes import Call, Done, Heuristic, Outcome, Rejected, Verb
from amends.payload import Payload
from amends.wire import call_of_resolver, essentials_of
from amends_runtime.api.deciding import Decisions
from amends_runtime.core.records import CommitDecision
from amends_runtime.core.two_phase import LOCKED
from amends_runtime.errors import AmendsError
from tests.simulation import vote_rules
from tests.simulation.faults import Fault

if TYPE_CHECKING:
    from amends_runtime.actors.supervisor import Supervisor
    from tests.simulation.participants import Life, Participant
    from tests.simulation.runtime import Process
    from tests.simulation.world import World

__all__ = ["Branches", "account_of", "action_of", "amount_of"]

ASK_AFTER_S = (0.001, 1.5)  # after the vote, or the last answer
QUESTION_S = (0.0002, 0.05)  # a question's way, and its answer's
MOST_QUESTIONS = 5  # of one vote


def action_of(account: str, amount: int) -> str:
    """The action that adds an amount to an account, or takes it away."""
    return f"{'take' if amount < 0 else 'give'}-{abs(amount)}-{account}"


def amount_of(action: str) -> int:
    """What an action adds."""
    kind, amount, _ = action.split("-")
    return -int(amount) if kind == "take" else int(amount)


def account_of(action: str) -> str:
    """To whose account."""
    return action.split("-")[2]


class Branches:
    """What a participant has voted for. Everything in it is in its database."""

    def __init__(self, world: World, participant: Participant) -> None:
        self.balances: Counter[str] = Counter()
        self.holds: dict[str, Life] = {}  # whose vote an account is held for
        self._world = world
        self._participant = participant
        self._asking: dict[Life, bytes] = {}  # what is known of a call, once it has voted
        self._lost: set[Life] = set()
        # Who was refused whose account last; for the count of deadlocks.
        self._wanted: dict[Life, Life] = {}

    # -- what a call comes to --------------------------------------------------------------------

    def lost(self, call: Call) -> bool:
        """Whether what the call speaks of was lost: a restored database takes no old vote."""
        return call.verb is Verb.PREPARE and _life(call) in self._lost

    def may_lose(self, call: Call) -> bool:
        """Whether the vote that the call is about is lost by the time that it is looked for."""
        if call.verb is Verb.PREPARE or _life(call) not in self._asking:
            return False
        if not self._world.faults.strikes(Fault.VOTE_LOST, _where(call)):
            return False
        self._breaks(call)
        self._lost.add(_life(call))
        self._let_go(_life(call))
        return True

    def handle(self, call: Call) -> Outcome:
        """Vote, or carry a decision out."""
        if call.verb is Verb.PREPARE:
            return self._vote(call)
        faults, commits = self._world.faults, call.verb is Verb.EXECUTE
        if faults.strikes(Fault.ALONE_CONTRARY, _where(call)):
            self._breaks(call)
            return Heuristic(not commits, "by_hand")
        if faults.strikes(Fault.ALONE_AGREEING, _where(call)):
            return Heuristic(commits, "by_hand")
        if commits and faults.strikes(Fault.COMMIT_REFUSED, _where(call)):
            self._breaks(call)
            return Rejected("expired")
        return Done()

    def _vote(self, call: Call) -> Outcome:
        faults, life = self._world.faults, _life(call)
        holder = self.holds.get(account_of(call.action))
        refusal = ""
        if holder is not None and holder != life:
            faults.count(Fault.LOCKED, _where(call))
            self._note_deadlock(life, holder)
            refusal = LOCKED
        elif faults.strikes(Fault.FOREIGN_LOCK, _where(call)):
            refusal = LOCKED
        elif faults.strikes(Fault.VOTE_NO, _where(call)):
            refusal = "declined"
        if refusal:
            return Rejected(refusal)
        return Done(Payload(f"{call.saga_id}/{call.step}/{call.round}".encode(), "text/plain"))

    def _note_deadlock(self, life: Life, holder: Life) -> None:
        """Two that are refused what the other one holds would wait for ever if they waited."""
        self._wanted[life] = holder
        for participant in self._world.participants.values():
            others = participant.branches
            held = {_commit(one) for one in others.holds.values()}
            for wanted, by in others._wanted.items():
                same = _commit(wanted) == _commit(holder) and _commit(by) == _commit(life)
                if same and _commit(life) in held:
                    self._world.faults.count(Fault.DEADLOCK, f"{life[0]} and {holder[0]}")
                    return

    def _breaks(self, call: Call) -> None:
        self._world.facts.broken_votes.add((call.saga_id, call.step))

    # -- what is committed -----------------------------------------------------------------------

    def committed(self, call: Call) -> None:
        """The effect of a verb is in the database, together with its row."""
        life = _life(call)
        if call.verb is Verb.PREPARE:
            self.holds[account_of(call.action)] = life
            self._asking[life] = essentials_of(call)
            self._may_ask(life, MOST_QUESTIONS)
            return
        if call.from_resolver:
            self._world.faults.count(Fault.TOLD_EARLIER, _where(call))
        self._ends(call, commits=call.verb is Verb.EXECUTE)

    def decided_alone(self, call: Call, *, commits: bool) -> None:
        """Somebody has decided otherwise, or the same, and a call has found out."""
        self._ends(call, commits=commits)

    def _ends(self, call: Call, *, commits: bool) -> None:
        if commits:
            self.balances[account_of(call.action)] += amount_of(call.action)
        self._let_go(_life(call))

    def _let_go(self, life: Life) -> None:
        self._asking.pop(life, None)
        for account in [account for account, held in self.holds.items() if held == life]:
            del self.holds[account]

    # -- questions -------------------------------------------------------------------------------

    def _may_ask(self, life: Life, left: int) -> None:
        where = f"{life[0]}/{life[1]}/{life[2]}"
        if left and self._world.faults.strikes(Fault.ASKED, where):
            self._later(self._world.faults.between(*ASK_AFTER_S), life, left)

    def _later(self, delay_s: float, life: Life, left: int) -> None:
        self._world.network.under_way += 1
        self._world.later(delay_s, self._ask, life, left)

    def _ask(self, life: Life, left: int) -> None:
        """Ask the oldest runtime that lives, whether or not it still has the store."""
        world = self._world
        world.network.under_way -= 1
        processes = [one for one in world.deployment.living() if one.is_serving]
        if life not in self._asking or self._participant.is_down or not processes:
            return
        process = processes[0]
        if process is not world.deployment.current:
            world.faults.count(Fault.ASKED_OLD, process.name)
        saga_id, _, round_ = life

        async def find(supervisor: Supervisor) -> CommitDecision | None:
            identity = process.store.identity
            decisions = Decisions(supervisor, process.store, identity)
            return await decisions.find(
                saga_id, round_, store_id=identity.store_id, incarnation=world.disk.incarnation
            )

        reply = process.handle(find)
        reply.add_done_callback(
            lambda reply: self._answered(life, left, process, reply), context=world.context
        )

    def _answered(
        self, life: Life, left: int, process: Process, reply: asyncio.Future[CommitDecision | None]
    ) -> None:
        error = reply.exception()
        if error is not None:
            if not isinstance(error, AmendsError):
                raise error
            self._may_ask(life, left - 1)
            return
        self._world.network.under_way += 1
        delay_s = self._world.faults.between(*QUESTION_S)
        self._world.later(delay_s, self._told, life, left, process, reply.result())

    def _told(
        self, life: Life, left: int, process: Process, decision: CommitDecision | None
    ) -> None:
        world = self._world
        world.network.under_way -= 1
        said = decision.name if decision is not None else "nothing"
        world.trace.add(
            "{} told {} {}/{}: {}", process.name, self._participant.name, *life[:2], said
        )
        vote_rules.check_answer(world, life[0], life[2], decision)
        if life not in self._asking or self._participant.is_down:
            return
        if decision in (CommitDecision.COMMIT, CommitDecision.ABORT):
            verb = Verb.EXECUTE if decision is CommitDecision.COMMIT else Verb.COMPENSATE
            self._participant.resolve(call_of_resolver(self._asking[life], verb))
        else:
            self._may_ask(life, left - 1)


def _life(call: Call) -> Life:
    return call.saga_id, call.step, call.round


def _commit(life: Life) -> tuple[str, int]:
    return life[0], life[2]


def _where(call: Call) -> str:
    return f"{call.saga_id}/{call.step}/{call.verb}/{call.round}"
