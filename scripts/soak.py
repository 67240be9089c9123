"""`make soak`: sagas under load while processes are killed with SIGKILL; then the audit.

How to think about it. Everything that happens is drawn from one seed: which sagas there are, what
goes wrong with each, which process is killed after which of the client's news. What the machine
makes of it (who is how far at that moment) is its own affair, and differs each time.

1. The participants and the runtime are processes of their own, each with its own database. A killed
   one is started again at once, on the same port and the same database. By default some of the
   participants are called over streams and some by the unary verbs, so that every saga goes by
   both; `--transport` says otherwise.
2. What is soaked is said by `--mode`: orders of the shop (``saga``, see `soak_orders.py`), or
   transfers between the branches of its bank (``2pc``, see `soak_transfers.py`), one of which is on
   PostgreSQL, which is killed as well.
3. The load is a closed loop of clients over one connection. A client writes into its journal that
   it is about to start a saga, then starts it, writes that it was acknowledged, waits, and writes
   the end. When the runtime is gone it just asks again, under the same id. Impatient ones do not:
   their starts may stay unknown, and whatever became of them must still be whole. Forgetful ones do
   not wait: nothing but the runtime itself carries their sagas on after a kill.
4. A kill strikes after the k-th piece of news (an acknowledgement or an end), plus some
   milliseconds. Some strike a runtime that is only just coming up again.
5. When all is started, there is so much time for everything to end, which is only looked at in
   lists, since to wait for a saga would wake it. What has not ended by then is a violation, as is a
   runtime that does not end in order when it is told to.
6. The auditor reads the participants' books and the client's journal, and never what the runtime
   believes. Of transfers the books are looked at while it runs, too: now and then no client starts
   anything until nothing is under way, and then all the money must be there.

The last line on standard output is one JSON object. Exit code: 0 when nothing is wrong; 1 when
something is, and then the folder with all databases, logs and the journal is kept; 2 for arguments
that cannot be; 130 when interrupted. No process is left behind in any case.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import anyio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `scripts` is no package

from scripts.soak_load import Tally
from scripts.soak_orders import Orders
from scripts.soak_plan import NOTHING_FOUND, TRANSPORTS, Findings, Trade
from scripts.soak_run import Options, missing, run, say_result, spread
from scripts.soak_transfers import Transfers

TRADES: Final[Mapping[str, type[Trade]]] = {each.mode: each for each in (Orders, Transfers)}


async def soak(options: Options, folder: Path) -> dict[str, Any]:
    """Run it all in `folder`, say what happens, and give the last line's content."""
    began_s = time.monotonic()
    tally = Tally()
    failures = await run(options, folder, tally)
    if not failures:  # a run that did not come to its end is not to be blamed for what it left out
        failures += missing(options, tally)
    found = _audit(options.trade, folder, failures)
    by_transport = Counter[str]()
    for participant, count in found.by_participant:
        by_transport[options.way_to(participant)] += count
    if not failures:
        ways = {options.way_to(participant) for participant in options.trade.participants}
        failures += [f"nothing took effect by {way}" for way in ways if not by_transport[way]]
    say_result(tally, found, by_transport, failures)
    return {
        "mode": options.trade.mode,
        "seed": options.seed,
        "sagas": found.sagas,
        "kills": tally.kills.total(),
        "completed": found.completed,
        "compensated": found.compensated,
        "violations": found.violations + len(failures),
        "stuck": tally.stuck,
        "unknown_starts": found.unknown_starts,
        "seconds": round(time.monotonic() - began_s, 1),
        "clients": options.clients,
        "transport": options.transport,
        "effects_by_transport": dict(sorted(by_transport.items())),
        "kills_by_process": dict(sorted(tally.kills.items())),
        "kills_while_starting": tally.kills_while_starting,
        "restart_s": spread(tally.restart_s),
        "first_news_s": spread(tally.first_news_s),
        "resident_mib": {
            "first": tally.resident_mib[0] if tally.resident_mib else None,
            "highest": max(tally.resident_mib, default=None),
            "last": tally.resident_mib[-1] if tally.resident_mib else None,
        },
        "effects": dict(found.effects),
        "faults": dict(sorted(tally.faults.items())),
        **({"looks": tally.looks} if tally.looks else {}),
        **found.more,
    }


def _audit(trade: Trade, folder: Path, failures: list[str]) -> Findings:
    """Audit what there is; a run that failed early may have left nothing to audit."""
    try:
        return trade.audit(folder)
    except trade.unreadable as error:
        failures.append(f"cannot audit {folder}: {error}")
        return NOTHING_FOUND


# -- the command -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak; gives the exit code."""
    options = _read_options(arguments)
    folder = Path(tempfile.mkdtemp(prefix="amends-soak-"))
    print(
        f"soak of {options.sagas:,} sagas ({options.trade.mode}) and {options.kills} kills, "
        f"seed {options.seed}, {options.clients} clients, in {folder}",
        flush=True,
    )
    last_line = anyio.run(_until_interrupted, options, folder)
    is_clean = last_line is not None and last_line["violations"] == 0
    if is_clean and not options.keep:
        shutil.rmtree(folder)
    else:
        again = f"make soak MODE={options.trade.mode} SEED={options.seed}"
        print(f"everything is kept in {folder}; {again} repeats the plan")
    if last_line is None:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(last_line))
    return 0 if is_clean else 1


async def _until_interrupted(options: Options, folder: Path) -> dict[str, Any] | None:
    """Soak until the end, or until SIGINT or SIGTERM, and then give None."""
    last_line: dict[str, Any] | None = None

    async def listen() -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            await anext(signals)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        last_line = await soak(options, folder)
        tasks.cancel_scope.cancel()
    return last_line


def _read_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="make soak", description="Kill processes under load, then audit the books."
    )
    parser.add_argument("--sagas", type=int, default=300, help="sagas to start (default 300)")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs in between (default 10)")
    parser.add_argument("--seed", type=int, help="of the plan; default: a new one, printed")
    parser.add_argument("--clients", type=int, default=32, help="sagas at a time (default 32)")
    parser.add_argument(
        "--mode",
        choices=[*TRADES],
        default=Orders.mode,
        help="saga (default): orders; 2pc: two-phase commits, transfers",
    )
    parser.add_argument(
        "--transport",
        choices=TRANSPORTS,
        default="both",
        help="auto: streams; unary: the unary verbs; both (default): some each",
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    given = parser.parse_args(arguments)
    for name, least in (("sagas", 1), ("kills", 0), ("clients", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return Options(
        trade=TRADES[given.mode](),
        sagas=given.sagas,
        kills=given.kills,
        seed=secrets.randbelow(2**32) if given.seed is None else given.seed,
        clients=given.clients,
        transport=given.transport,
        keep=given.keep,
    )


if __name__ == "__main__":
    sys.exit(main())
