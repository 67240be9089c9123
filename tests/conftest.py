"""What every test shares: the event loop's backend and the property tests' seed and depth."""

import random

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
    """Choose a seed if none is given, before hypothesis looks for one."""
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
