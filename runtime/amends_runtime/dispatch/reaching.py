"""Whether anybody answers at a participant's address, looked at once, from the runtime's own place.

No more than a connection is opened and closed: neither TLS nor a call of the contract, whose
failures the first call tells in its own words. It is for a word of warning to whoever has just
given an address; nothing is decided by it.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

__all__ = ["why_not_reached"]

PATIENCE_S: Final = 1.0
"""Somebody waits at a terminal. What takes longer to connect is as good as not there."""


async def why_not_reached(address: str, patience_s: float = PATIENCE_S) -> str:
    """Why nothing answers at `host:port` or `unix:path` now; empty if something does.

    Takes no longer than `patience_s` and raises nothing.
    """
    loop = asyncio.get_running_loop()
    connection: asyncio.Transport
    try:
        async with asyncio.timeout(patience_s):
            if address.startswith("unix:"):
                path = address.removeprefix("unix:")
                connection, _ = await loop.create_unix_connection(asyncio.Protocol, path)
            else:
                host, _, port = address.rpartition(":")
                connection, _ = await loop.create_connection(
                    asyncio.Protocol, host.strip("[]"), int(port)
                )
    except TimeoutError:
        return f"nothing answers at {address} yet: no connection within {patience_s:g} s"
    except OSError as error:
        return f"nothing answers at {address} yet: {_reason(error)}"
    except (ValueError, UnicodeError):  # a host that no resolver takes
        return f"nothing answers at {address} yet: its host is not known"
    connection.abort()  # at once; there is nothing to be flushed
    return ""


def _reason(error: OSError) -> str:
    """The system's words: asyncio's own name the address once more."""
    number = error.errno or 0
    if number > 0:  # a resolver's numbers are negative
        return os.strerror(number)
    return error.strerror or "no answer"
