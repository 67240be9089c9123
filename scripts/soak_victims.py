"""What a soak kills, and starts again."""

from __future__ import annotations

from typing import Protocol

from shop.processes import Process


class Victim(Protocol):
    """What can be killed and started again."""

    @property
    def name(self) -> str:
        """What it is called in the plan."""
        ...

    def ended(self) -> str:
        """Say how it has ended by itself; empty while it runs, or is on its way."""
        ...

    async def kill(self) -> None:
        """End it with SIGKILL, and begin to start it again."""
        ...

    async def wait_ready(self) -> None:
        """Wait until it works again. Raises `ProcessFailed`."""
        ...


class ProcessVictim:
    """A process of the shop's."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.name = process.name

    def ended(self) -> str:
        """Say how it has ended by itself."""
        process = self._process
        if process.is_running:
            return ""
        return f"{process.name} ended by itself, with {process.exit_code}\n{process.last_lines()}"

    async def kill(self) -> None:
        """Kill it, and begin to start it again."""
        self._process.kill()
        self._process.start_nowait()

    async def wait_ready(self) -> None:
        """Wait until it is ready."""
        await self._process.wait_ready()
