"""What every test shares: the event loops, and the property tests' seed and depth."""

import asyncio
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Verbosity, settings

# How far the property tests search, in examples per test: `make test MODE=long`. No deadlines,
# because no test here is timed; a slow machine draws its examples slowly, and that is no fault.
settings.register_profile(
    "quick",
    max_examples=100,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
    verbosity=Verbosity.normal,
)
settings.register_profile("long", settings.get_profile("quick"), max_examples=500)
settings.register_profile("night", settings.get_profile("quick"), max_examples=20_000)
settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Hear Ctrl-C again, and choose a seed if none is given, before hypothesis looks for one."""
    # A shell starts what it puts into the background deaf to it, and every process that a test
    # starts and interrupts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str:
    """Print the seed, by which a failure can be repeated."""
    return how_to_repeat(config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seed again where it is needed: a quiet run shows no header."""
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(how_to_repeat(terminalreporter.config))


def how_to_repeat(config: pytest.Config) -> str:
    """Name the seed and the command that uses it."""
    seed = config.option.hypothesis_seed
    return f"hypothesis seed: {seed} (to repeat: make test SEED={seed})"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run on asyncio only: grpc.aio knows no other loop."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _ends_for_loops_that_have_ended() -> Iterator[None]:
    """Drop the ends of gRPC calls whose event loop is closed.

    gRPC has one poller for all loops of a process: it hands the end of a call to whichever runs,
    and that one hands it on to the call's own. If that is closed, as a test's is that did not wait
    for a call which it cancelled, the error would be the next test's.
    """
    hand_on = asyncio.BaseEventLoop.call_soon_threadsafe

    def unless_it_is_closed(
        self: asyncio.BaseEventLoop, callback: Callable[..., object], *args: Any, **options: Any
    ) -> asyncio.Handle | None:
        if self.is_closed() and getattr(callback, "__name__", "") == "_handle_callback_wrapper":
            return None
        return hand_on(self, callback, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", unless_it_is_closed)
        yield
