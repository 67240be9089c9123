"""The filters of `list` and `watch`: instants as people write them."""

import time

import pytest

from amends_runtime.cli.app import run
from amends_runtime.cli.exits import Exit, ExitCode
from amends_runtime.cli.filters import instant_ms
from tests.cli.conftest import amends

NOW_MS = 1_800_000_000_000  # 2027-01-15T08:00:00Z


@pytest.mark.parametrize(
    ("given", "at_ms"),
    [
        ("90s", NOW_MS - 90_000),
        ("1.5m", NOW_MS - 90_000),
        ("2h", NOW_MS - 7_200_000),
        ("3d", NOW_MS - 259_200_000),
        ("2027-01-15", NOW_MS - 8 * 3_600_000),
        ("2027-01-15T08:00", NOW_MS),
        ("2027-01-15T08:00Z", NOW_MS),
        ("2027-01-15 09:00:00.250+01:00", NOW_MS + 250),
        ("2027-01-15T08:00:00.000Z", NOW_MS),  # as amends prints it
    ],
)
def test_an_instant_is_a_date_a_time_or_how_long_ago(given: str, at_ms: int) -> None:
    """UTC where no zone is named, as in everything that amends prints."""
    assert instant_ms(given, "--started-from", now_ms=NOW_MS) == at_ms


@pytest.mark.parametrize(
    "given",
    ["", "yesterday", "2h ago", "-2h", "25:00", "2027-13-01", "99999999d", "1e9s", "1969-12-31"],
)
def test_what_is_no_instant_is_a_usage_error(given: str) -> None:
    """The line names the flag, what was given, and the forms that there are."""
    with pytest.raises(Exit) as refused:
        instant_ms(given, "--started-from", now_ms=NOW_MS)
    assert refused.value.code is ExitCode.USAGE
    [line] = refused.value.lines
    assert line.startswith(f"--started-from {given}: is no instant")
    assert "2h" in line


def test_a_list_is_bounded_by_when_sagas_were_started(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an instant, and before one."""
    shelf = ("--label", "shelf=times")
    before = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(time.time() - 60))}Z"
    started = amends("start", "order", "--id", "times-1", *shelf, "--wait", "--target", target)
    assert started.returncode == 0, started.stderr

    def ids(*arguments: str) -> list[str]:
        assert run(["list", *shelf, *arguments, "--target", target]) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]

    assert ids("--started-from", "1h") == ["times-1"]
    assert ids("--started-from", before) == ["times-1"]
    assert ids("--started-before", before) == []
    assert run(["list", "--started-from", before, "--started-before", "1h"]) == 2
    assert capsys.readouterr().err == (
        f"amends: --started-before 1h: is not after --started-from {before}: no saga can match\n"
    )
