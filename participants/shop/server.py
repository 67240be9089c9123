"""One service or branch as one process: the command line, the database, the switches, the end.

A process ends by draining when it is told to (SIGTERM, SIGINT) or, with ``--until-stdin-closes``,
when its standard input closes: whoever started it holds the other end, and takes it along however
it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

import amends
from shop import bank_books, ledger
from shop.bank import BRANCHES, DSN_VARIABLE, EAST, Branch
from shop.bank_east import make_bank_east
from shop.bank_fees import make_bank_fees
from shop.bank_west import make_bank_west
from shop.catalogue import OPENING_BALANCES_CENTS, PRODUCTS, SERVICES
from shop.faults import FaultLog, FaultyBarrier
from shop.inventory import inventory
from shop.orders import orders
from shop.payments import payments
from shop.ports import HeldPort
from shop.shipping import shipping
from shop.switches import SwitchBoard, SwitchesError
from shop.tracing import exported

EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 5

LOOK_EVERY_S: Final = 0.05
"""How often the switch `down` is looked at; every call looks at the others."""

GRACE_S: Final = 0.0
"""Being down must not wait for anybody; amends itself gives the calls under way one second."""

IN_DOUBT_AFTER_S: Final = 1.0
"""When a branch begins to ask what became of its vote. Somebody watches; the default of 30 s is for
those who don't."""

ASK_EVERY_S: Final = 0.5
"""How often a branch looks for votes that are in doubt."""

PARTICIPANTS: Final = {
    participant.name: participant for participant in (orders, payments, inventory, shipping)
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    service: str
    host: str
    port: int
    insecure: bool
    database: Path
    runtime: str | None
    ready_file: Path | None
    switches: Path | None
    until_stdin_closes: bool


def faults_file(database: Path) -> Path:
    """Say where a service writes down the faults that struck: beside its database."""
    return database.with_name(f"{database.stem}.faults.jsonl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to end; gives the exit code: 0, 2 (usage) or 5 (database)."""
    options = _read_options(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    board = SwitchBoard(
        options.switches or Path(os.devnull),
        options.service,
        complain=lambda line: logging.getLogger("shop").error("%s", line),
    )
    try:
        if options.switches is not None:
            board.load()
        held = HeldPort(options.host, options.port)
    except SwitchesError as error:
        return _failed(options.service, str(error), EXIT_USAGE)
    except OSError as error:
        listen = f"{options.host}:{options.port}"
        return _failed(options.service, f"cannot listen on {listen}: {error.strerror}", EXIT_USAGE)
    try:
        with (
            FaultLog(faults_file(options.database), options.service) as log,
            exported(options.service),
        ):
            anyio.run(_serve, options, board, log, held)
    except amends.ListenError as error:
        return _failed(options.service, str(error), EXIT_USAGE)
    except (amends.BarrierError, OSError) as error:
        return _failed(options.service, str(error), EXIT_UNAVAILABLE)
    finally:
        held.close()
    return 0


def _failed(service: str, why: str, code: int) -> int:
    print(f"{service}: {why}", file=sys.stderr)
    return code


def _read_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m shop", description="One service of the shop, or one branch of its bank."
    )
    parser.add_argument("service", choices=(*SERVICES, *BRANCHES))
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen where other machines reach it, in plain text; for a network of its own",
    )
    parser.add_argument(
        "--database",
        type=Path,
        required=True,
        metavar="FILE",
        help=f"where its data are, and beside which its faults are written down; {EAST} has its "
        f"data in the PostgreSQL that the environment variable {DSN_VARIABLE} names",
    )
    parser.add_argument(
        "--runtime",
        metavar="HOST:PORT",
        help="whom a branch asks about votes that are in doubt",
    )
    parser.add_argument(
        "--ready-file",
        type=Path,
        metavar="FILE",
        help='gets {"pid": …, "address": …} as soon as calls are taken',
    )
    parser.add_argument(
        "--switches",
        type=Path,
        metavar="FILE",
        help="what is to go wrong; see shop/switches.py",
    )
    parser.add_argument(
        "--until-stdin-closes",
        action="store_true",
        help="end when the standard input closes, as with SIGTERM",
    )
    given = parser.parse_args(arguments)
    if given.service == EAST and not os.environ.get(DSN_VARIABLE):
        parser.error(f"{EAST} needs the environment variable {DSN_VARIABLE}: a PostgreSQL's DSN")
    host, _, port = given.listen.rpartition(":")
    if not host or not port.isdecimal():
        parser.error(f"--listen {given.listen}: write HOST:PORT, for example 127.0.0.1:0")
    return Options(
        service=given.service,
        host=host,
        port=int(port),
        insecure=given.insecure,
        database=given.database,
        runtime=given.runtime,
        ready_file=given.ready_file,
        switches=given.switches,
        until_stdin_closes=given.until_stdin_closes,
    )


async def _serve(options: Options, board: SwitchBoard, log: FaultLog, held: HeldPort) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.until_stdin_closes:
        _watch_stdin(loop, stop)
    if options.service in BRANCHES:
        branch = make_branch(options.service, options.database)
        participant, in_doubt = branch.participant, branch.in_doubt
    else:
        participant, in_doubt = PARTICIPANTS[options.service], None
        participant.barrier = amends.SqliteBarrier(
            options.database, schema=ledger.schema(options.service)
        )
    barrier = participant.barrier
    handlers = participant.handlers()
    participant.barrier = FaultyBarrier(barrier, board, log, handlers=handlers)

    def resolver() -> amends.InDoubtResolver | None:
        if in_doubt is None or options.runtime is None:
            return None
        return amends.InDoubtResolver(
            in_doubt,
            options.runtime,
            older_than_s=IN_DOUBT_AFTER_S,
            every_s=ASK_EVERY_S,
        )

    # Held open beyond the servers below, so that being down costs no reopening.
    await barrier.open()
    try:
        await open_shop(options.service, barrier)
        await _serve_while_up(
            participant,
            held.address,
            resolver=resolver,
            insecure=options.insecure,
            ready_file=options.ready_file,
            board=board,
            log=log,
            stop=stop,
        )
    finally:
        await barrier.aclose()


def make_branch(name: str, database: Path) -> Branch:
    """Make a branch over its file, or over the PostgreSQL that the environment names."""
    match name:
        case "bank-east":
            return make_bank_east(os.environ[DSN_VARIABLE])
        case "bank-west":
            return make_bank_west(database)
        case "bank-fees":
            return make_bank_fees(database)
        case _:
            raise ValueError(f"the bank has no branch {name!r}")


async def _serve_while_up(
    participant: amends.Participant,
    address: str,
    *,
    resolver: Callable[[], amends.InDoubtResolver | None],
    insecure: bool,
    ready_file: Path | None,
    board: SwitchBoard,
    log: FaultLog,
    stop: asyncio.Event,
) -> None:
    """Serve, and be down while the switch says so, until `stop`."""
    if board.current().down and ready_file is not None:
        _announce(ready_file, address)  # or nobody would know that it is ready to be switched on
        ready_file = None
    while not stop.is_set():
        if not board.current().down:
            async with amends.serve(
                participant, address, insecure=insecure, grace_s=GRACE_S, resolver=resolver()
            ):
                if ready_file is not None:
                    _announce(ready_file, address)
                    ready_file = None
                await _wait_until(stop, board, is_down=True)
            if not stop.is_set():
                log.write("down")
        await _wait_until(stop, board, is_down=False)


async def _wait_until(stop: asyncio.Event, board: SwitchBoard, *, is_down: bool) -> None:
    while not stop.is_set() and board.current().down is not is_down:
        with anyio.move_on_after(LOOK_EVERY_S):
            await stop.wait()


async def open_shop(service: str, barrier: amends.Barrier) -> None:
    """Give a new database what the catalogue says; an old one keeps what it has."""
    if not isinstance(barrier, amends.SqliteBarrier):
        return  # its schema has seen to that

    def stock_up(transaction: amends.Transaction) -> None:
        if service == "payments":
            transaction.executemany(
                "INSERT OR IGNORE INTO accounts (account, opening_cents, balance_cents)"
                " VALUES (?, ?, ?)",
                [(name, cents, cents) for name, cents in OPENING_BALANCES_CENTS.items()],
            )
        elif service == "inventory":
            transaction.executemany(
                "INSERT OR IGNORE INTO stock (sku, opening, on_hand) VALUES (?, ?, ?)",
                [(sku, p.opening_stock, p.opening_stock) for sku, p in PRODUCTS.items()],
            )
        elif service in BRANCHES:
            bank_books.open_accounts(transaction, service)

    await barrier.write(stock_up)


def _announce(ready_file: Path, address: str) -> None:
    """Write the ready file at once, so that nobody reads half of it."""
    beside = ready_file.with_name(f"{ready_file.name}.new")
    beside.write_text(json.dumps({"pid": os.getpid(), "address": address}) + "\n", encoding="utf-8")
    beside.replace(ready_file)


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Set `stop` when the standard input closes."""

    def read_to_the_end() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(stop.set)

    # A daemon: it may sit in its read when the process ends for another reason.
    threading.Thread(target=read_to_the_end, name="stdin", daemon=True).start()
