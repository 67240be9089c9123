"""The runtime's log during a test: handed to the standard library's logging, where pytest finds it.

An application that has configured structlog keeps its configuration, and gets the log there.
"""

from __future__ import annotations

import logging
from typing import Final

import structlog

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
        structlog.configure(
            processors=[
                structlog.stdlib.filter_by_level,
                structlog.stdlib.add_log_level,
                structlog.processors.format_exc_info,
                structlog.processors.KeyValueRenderer(key_order=["event"]),
            ],
            logger_factory=self._factory,
            wrapper_class=structlog.stdlib.BoundLogger,
        )

    def end(self) -> None:
        """Leaves everything as it was."""
        if self._factory is None:
            return
        if structlog.get_config()["logger_factory"] is self._factory:
            structlog.reset_defaults()
        self._factory = None
        logging.getLogger(_LOGGER).removeHandler(_NOWHERE)


_NOWHERE: Final = logging.NullHandler()
