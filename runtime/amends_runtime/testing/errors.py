"""What the test kit itself raises.

    SagaTestError
    ├── InvalidScript        a script that cannot be: an unknown name, an answer that is none
    ├── InsideEventLoop      a SagaTest was used where an event loop is running
    ├── NotEnded             the saga does not get where it was to get; says where it stands
    ├── UnusedScript         what was scripted was never asked for
    └── CrashMatters         a crash of the runtime changed how the sagas end

The last three are AssertionErrors, too: what is wrong then is the saga, or what the test expects.

An error of the SDK stays what it is: `amends.InvalidDefinition` for a definition,
`amends.WrongState`, `amends.AlreadyExists` and the like for what a runtime refuses a client.
"""

from __future__ import annotations

__all__ = [
    "CrashMatters",
    "InsideEventLoop",
    "InvalidScript",
    "NotEnded",
    "SagaTestError",
    "UnusedScript",
]


class SagaTestError(Exception):
    """Anything that the test kit says is wrong with a test, or with what is tested."""


class InvalidScript(SagaTestError, ValueError):
    """A script that cannot be: a participant or action that no definition has, or a wrong answer.

    Raised where the script is written; the message says what there is instead.
    """


class InsideEventLoop(SagaTestError, RuntimeError):
    """A `SagaTest` was used inside a running event loop; it drives one of its own."""

    def __init__(self) -> None:
        super().__init__(
            "a SagaTest drives an event loop of its own, in virtual time, and cannot do so inside"
            " one that runs: make this test a plain `def`, or let all of it run in a thread,"
            " `await asyncio.to_thread(the_test)`"
        )


class NotEnded(SagaTestError, AssertionError):
    """A saga does not get where it was to get. The message says where each saga stands, and why."""


class UnusedScript(SagaTestError, AssertionError):
    """Actions that were scripted were never asked, so the test has not tested what it says.

    `scripts` names them. Begin with ``SagaTest(..., strict=False)`` where that is meant to be so.
    """

    def __init__(self, scripts: tuple[str, ...]) -> None:
        self.scripts = scripts
        lines = "".join(f"\n  {script}" for script in scripts)
        super().__init__(
            "these actions are scripted and were never asked, so this test does not test them"
            f" (strict=False, if that is meant to be so):{lines}"
        )


class CrashMatters(SagaTestError, AssertionError):
    """A saga ended otherwise when the runtime was killed at some point of its course."""
