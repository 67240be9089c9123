"""`amends runtime`, `breakers` and `version`."""

# ruff: noqa: PLC0415  # what is heavy is imported by the command that runs, not by help

from __future__ import annotations

from importlib import metadata

from amends_runtime.cli.options import COMMON, Common

__all__ = ["breakers", "installed_version", "runtime", "version"]


def installed_version() -> str:
    """The version of amends that is installed here."""
    return metadata.version("amends")


def version() -> None:
    """Print the version of amends that is installed here.

    `amends runtime` shows that of a running one.
    """
    from amends_runtime.cli.tables import print_line

    print_line(installed_version())


async def runtime(*, common: Common = COMMON) -> None:
    """Show what the runtime is: version, store, epoch, sagas by state.

    For example:

      amends runtime
      amends runtime -o json | jq .sagas.STUCK
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.documents import document, instant, print_document
    from amends_runtime.cli.tables import print_facts

    async with connect(common) as client:
        found = await client.runtime()
    if common.output != "table":
        print_document(document(found), common.output)
        return
    print_facts(
        [
            ("address", common.target),
            ("version", found.version),
            ("started", instant(found.started_at_ms)),
            ("store", found.store_id),
            ("incarnation", found.incarnation),
            (
                "restored",
                "yes, and nobody has confirmed it: two-phase commits from before it are held back "
                "(amends in-doubt), and participants in doubt are answered UNKNOWN; "
                "amends confirm-restore --help says more"
                if found.restored
                else "",
            ),
            ("epoch", str(found.epoch)),
            ("sagas", ", ".join(f"{count} {state}" for state, count in found.sagas.items()) or "0"),
            (
                "without wake-up",
                f"{found.without_wake_up}: a bug in amends, please report it"
                if found.without_wake_up
                else "",
            ),
        ]
    )


async def breakers(*, common: Common = COMMON) -> None:
    """List circuit breakers.

    Calls of a participant whose breaker is open wait; nothing is compensated
    because of it. HELD is about the breaker and not about calls: it says that an
    operator keeps it in its state, which no command of this version does.

    For example:

      amends breakers
    """
    from amends_runtime.cli.client import connect
    from amends_runtime.cli.documents import print_list
    from amends_runtime.cli.tables import print_table, short_instant

    async with connect(common) as client:
        found = await client.breakers()
    if common.output != "table":
        print_list("breakers", found, common.output)
        return
    print_table(
        ("PARTICIPANT", "STATE", "FAILURES", "SINCE", "NEXT PROBE", "HELD"),
        (
            (
                each.participant,
                each.state,
                str(each.consecutive_failures),
                "" if each.since_ms is None else short_instant(each.since_ms),
                "" if each.next_probe_at_ms is None else short_instant(each.next_probe_at_ms),
                "by an operator" if each.held else "",
            )
            for each in found
        ),
    )
