"""The runtime's log during a test: handed to the standard library's logging, where pytest finds it.

An application that has configured structlog keeps its configuration, and gets the log there.

That a breaker opens and closes is said as the runtime says it. The probes in between are for
DEBUG: in virtual time an outage of a day has thousands, and they would bury everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import structlog

from amends_runtime.core.breaker import BreakerState

__all__ = ["QuietLog"]

_LOGGER: Final = "amends_runtime"


class QuietLog:
    """Keeps the runtime from printing its log on the terminal, from `begin` to `end`."""

    def __init__(self) -> None:
        self._factory: structlog.stdlib.LoggerFactory | None = None

    def begin(self) -> None:
        """Configures structlog, unless somebody else has."""
        if structlog.is_configured():
            return
        self._factory = structlog.stdlib.LoggerFactory()
        # Without a handler of its own a library's warnings go to the terminal.
        logging.getLogger(_LOGGER).addHandler(_NOWHERE)
        _OPEN.clear()
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.stdlib.add_log_level,
                structlog.processors.format_exc_info,
                structlog.processors.KeyValueRenderer(key_order=["event"]),
            ],
            logger_factory=self._factory,
            wrapper_class=_Logger,
        )

    def end(self) -> None:
        """Leaves everything as it was."""
        if self._factory is None:
            return
        if structlog.get_config()["logger_factory"] is self._factory:
            structlog.reset_defaults()
        self._factory = None
        logging.getLogger(_LOGGER).removeHandler(_NOWHERE)


class _Logger(structlog.stdlib.BoundLogger):
    """The usual one, to which probes of a breaker that is open are details."""

    def _proxy_to_logger(
        self, method_name: str, event: str | None = None, *event_args: str, **event_kw: Any
    ) -> Any:
        if event == "breaker_changed" and _is_probe(event_kw):
            method_name = "debug"
        return super()._proxy_to_logger(method_name, event, *event_args, **event_kw)


def _is_probe(change: Mapping[str, Any]) -> bool:
    """Whether a breaker that was open goes on being so, or is only tried."""
    participant, state = str(change.get("participant")), change.get("state")
    if state == BreakerState.CLOSED.name:
        _OPEN.discard(participant)
        return False
    if participant in _OPEN:
        return True
    _OPEN.add(participant)
    return False


_OPEN: Final[set[str]] = set()
"""The participants whose breaker is not closed; of one test, since one log has one."""
_NOWHERE: Final = logging.NullHandler()
