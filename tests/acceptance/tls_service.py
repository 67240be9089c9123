"""One service of the shop, served over mutual TLS, as a program; ends when its stdin closes.

    python tls_service.py SERVICE CERT KEY CLIENT_CA --listen=… --database=… --ready-file=…

The shop's own program has no TLS: its demo stays on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from pathlib import Path

import anyio

import amends
from shop import ledger
from shop.server import PARTICIPANTS, open_shop


def main() -> None:
    """Serve until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("service", choices=PARTICIPANTS)
    parser.add_argument("cert", type=Path)
    parser.add_argument("key", type=Path)
    parser.add_argument("client_ca", type=Path)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    given = parser.parse_args()
    barrier = amends.SqliteBarrier(given.database, schema=ledger.schema(given.service))
    anyio.run(_stock_up, given.service, given.database)
    participant = PARTICIPANTS[given.service]
    participant.barrier = barrier

    def announce(server: amends.Server) -> None:
        beside = given.ready_file.with_suffix(".new")
        beside.write_text(json.dumps({"address": server.address}), encoding="utf-8")
        beside.replace(given.ready_file)

    threading.Thread(target=_end_with_stdin, daemon=True).start()
    amends.run(
        participant,
        given.listen,
        tls=amends.TlsFiles(given.cert, given.key, client_ca=given.client_ca),
        grace_s=0,
        on_ready=announce,
    )


async def _stock_up(service: str, database: Path) -> None:
    barrier = amends.SqliteBarrier(database, schema=ledger.schema(service))
    async with barrier:
        await open_shop(service, barrier)


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
