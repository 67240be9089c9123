"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import Group, Parameter

from amends_runtime.cli.exits import Exit, ExitCode

__all__ = ["COMMON", "Common", "Debug", "Flag", "Labels", "parse_pairs"]

SHARED: Final = Group("Options of every command", sort_key=90)

Flag = Annotated[bool, Parameter(negative="", show_default=False)]
"""A switch that is off unless it is named."""

Debug = Annotated[
    bool,
    Parameter(
        name="--debug",
        negative="",
        show_default=False,
        env_var="AMENDS_DEBUG",
        group=SHARED,
        help="Show tracebacks.",
    ),
]

Labels = Annotated[
    tuple[str, ...],
    Parameter(name="--label", negative="", show_default=False, consume_multiple=False),
]
"""`--label KEY=VALUE`, as often as needed."""


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Where the runtime is, and how to print its answer."""

    target: Annotated[str, Parameter(env_var="AMENDS_TARGET", group=SHARED)] = "127.0.0.1:7233"
    """The runtime's address: host:port or unix:path."""

    tls_ca: Annotated[
        Path | None, Parameter(env_var="AMENDS_TLS_CA", group=SHARED, show_default=False)
    ] = None
    """Reach the runtime with TLS; its certificate must be signed by one in this PEM file."""

    tls_cert: Annotated[
        Path | None, Parameter(env_var="AMENDS_TLS_CERT", group=SHARED, show_default=False)
    ] = None
    """Your certificate, PEM, for a runtime that asks for one; with --tls-key."""

    tls_key: Annotated[
        Path | None, Parameter(env_var="AMENDS_TLS_KEY", group=SHARED, show_default=False)
    ] = None
    """Its private key, PEM, not encrypted."""

    tls_server_name: Annotated[
        str | None, Parameter(env_var="AMENDS_TLS_SERVER_NAME", group=SHARED, show_default=False)
    ] = None
    """The name that the runtime's certificate must have, if not the target's host."""

    output: Annotated[
        Literal["table", "json", "jsonl"], Parameter(name=("--output", "-o"), group=SHARED)
    ] = "table"
    """A table for people, one JSON document, or a JSON document a line."""

    debug: Debug = False


COMMON: Final = Common()


def parse_pairs(pairs: tuple[str, ...], flag: str, form: str) -> dict[str, str]:
    """KEY=VALUE arguments as a dictionary. Ends the command if one is not of that form."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise Exit(ExitCode.USAGE, f"{flag} {pair}: write {flag} {form}")
        if found.get(key, value) != value:
            raise Exit(ExitCode.USAGE, f"{flag} {key}: is given twice; keep one of them")
        found[key] = value
    return found
