"""The dashboard and the alerts ask for nothing that a real runtime does not show.

There is no Grafana here: what the dashboard means to it is not tested, only that each query's names
and labels exist, and what is true of the files by themselves. The alerts are Prometheus' own to try
where there is a `promtool`, on the PATH or named by $PROMTOOL.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
import pytest
import yaml

import amends
from amends_runtime.telemetry.metrics import TABLE, Kind
from scripts.gen_metrics_docs import PAGE, current
from tests.cli.conftest import Served
from tests.telemetry.promql import Asked, Matcher, asked
from tests.telemetry.scraping import Scrape, Series, get, scrape

ROOT: Final = Path(__file__).parent.parent.parent
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "amends.json"
ALERTS: Final = ROOT / "deploy" / "prometheus" / "alerts.yaml"
ALERTS_TEST: Final = ALERTS.with_name("alerts_test.yaml")
COMPOSE: Final = ROOT / "deploy" / "compose"

RUNBOOKS: Final = "https://amends.example/"
"""Nowhere: whoever uses the alerts puts their own place there."""

PROMTOOL: Final = os.environ.get("PROMTOOL") or shutil.which("promtool")

OF_PROMETHEUS: Final = {"instance", "job"}
"""Labels that Prometheus gives to whatever it scrapes."""

NOWHERE: Final = "127.0.0.1:1"
LEAST_PANELS: Final = 20
PATIENCE_S: Final = 60  # bounds a test that hangs; nothing is measured by it


# -- what the files ask ----------------------------------------------------------------------------


def dashboard() -> dict[str, Any]:
    """The dashboard's JSON."""
    board: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return board


def panels() -> Iterator[dict[str, Any]]:
    """Its panels, rows included."""
    for panel in dashboard()["panels"]:
        yield panel
        yield from panel.get("panels", [])


def rules() -> list[dict[str, Any]]:
    """All alerts."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Every query in both files, and where it stands."""
    for panel in panels():
        for target in panel.get("targets", []):
            yield f"panel {panel['title']!r}", target["expr"]
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]


def questions() -> Iterator[tuple[str, str]]:
    """What the dashboard's variables are filled with: a selector's labels."""
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            assert variable["query"]["query"] == variable["definition"]
            yield f"variable {variable['name']!r}", variable["definition"]


# -- what a runtime shows --------------------------------------------------------------------------


def a_shop() -> amends.Participant:
    """Does, refuses, breaks, fails, as it is asked."""
    shop = amends.Participant("shop", barrier=None)

    @shop.execute("do")
    def do(call: amends.Call) -> None:
        """Nothing to do."""

    @shop.compensate("do")
    def undo(call: amends.Call) -> None:
        """Nothing to undo."""

    @shop.execute("refuse", compensatable=False)
    def refuse(call: amends.Call) -> None:
        raise amends.Rejected("no")

    @shop.execute("break", compensatable=False)
    def break_(call: amends.Call) -> None:
        raise amends.Broken("ledger_lost")

    @shop.execute("fail", compensatable=False)
    def fail(call: amends.Call) -> None:
        raise ZeroDivisionError

    vote_for(shop)
    return shop


def vote_for(shop: amends.Participant) -> None:
    """A branch that would have to wait for a lock, once; and one that breaks its vote."""
    locked: set[str] = set()

    @shop.prepare("move")
    def ask(call: amends.Call) -> None:
        if call.saga_id not in locked:
            locked.add(call.saga_id)
            raise amends.Rejected("LOCKED")

    @shop.execute("move")
    def commit(call: amends.Call) -> None:
        raise amends.Broken("vote_lost")

    @shop.compensate("move")
    def roll_back(call: amends.Call) -> None:
        """Nothing is held."""


DEFINITIONS: Final = (
    amends.Definition("done").step("a", "shop", "do"),
    amends.Definition("turned").step("a", "shop", "do").read_only("b", "shop", "refuse"),
    amends.Definition("broken").read_only("a", "shop", "break"),
    amends.Definition("failing").read_only(
        "a", "shop", "fail", retry=amends.Retry(first_s=0.01, max_s=0.01, give_up_after_s=0.02)
    ),
    amends.Definition("mixed", mode=amends.Mode.TWO_PHASE_COMMIT, locked_retries=1).step(
        "a", "shop", "move"
    ),
    amends.Definition("away").step("a", "absent", "do"),
)


@asynccontextmanager
async def a_runtime(folder: Path) -> AsyncIterator[tuple[amends.Client, str]]:
    """A real `amends serve`, and where it shows its metrics."""
    async with amends.serve(a_shop(), listen="127.0.0.1:0") as shop:
        (folder / "amends.toml").write_text("[limits]\nlive_sagas = 2\n", encoding="utf-8")
        served = Served(
            *("--config", "amends.toml", "--listen", "127.0.0.1:0"),
            *("--metrics-listen", "127.0.0.1:0", "--ready-file", "ready.json"),
            *("--participant", f"shop={shop.address}", "--participant", f"absent={NOWHERE}"),
            cwd=folder,
        )
        try:
            await anyio.to_thread.run_sync(served.wait_for, "amends is up")
            ready = json.loads((folder / "ready.json").read_text(encoding="utf-8"))
            async with amends.Client(ready["address"], timeout_s=30) as client:
                yield client, ready["metrics"]
        finally:
            await anyio.to_thread.run_sync(served.close)


async def one_of_each(client: amends.Client) -> None:
    """Sagas of every outcome, a breaker that opens, a request that is refused."""
    for definition in DEFINITIONS:
        await client.register(definition)
    for name in ("done", "turned", "failing", "mixed"):
        await (await client.start(name)).result(timeout_s=30)
    await until_stuck(client, lambda: client.start("broken", saga_id="broken-1"))
    await until_stuck(client, lambda: client.retry("broken-1", author="test", reason="test"))
    await client.abandon("broken-1", author="test", reason="test")
    for number in range(2):
        await client.start("away", saga_id=f"away-{number}")
    # Held by the breaker they are under way; one between two attempts would make room.
    while [each.calls_waiting for each in await client.participants() if each.name == "absent"] != [
        2
    ]:
        await anyio.lowlevel.checkpoint()
    with pytest.raises(amends.AmendsError):
        await client.start("away", saga_id="one-too-many", timeout_s=0.5)


async def until_stuck(client: amends.Client, act: Callable[[], Awaitable[object]]) -> None:
    """Do something, and wait until a saga is stuck after it."""
    acted = False
    async for event in client.watch(state=amends.SagaState.STUCK):
        if event.saga is not None:
            return
        if not acted:
            acted = True
            await act()


async def shown_at_last(address: str, names: set[str]) -> Scrape:
    """What is shown once these have series; the runtime looks at its states every five seconds."""
    with anyio.fail_after(PATIENCE_S):
        while not names <= (shown := await scrape(address)).names:  # noqa: ASYNC110  # another process
            await anyio.sleep(0.5)
    return shown


async def test_every_query_asks_for_what_a_runtime_shows(tmp_path: Path) -> None:
    """Each name, each label, and each label's value, after sagas of each outcome."""
    async with a_runtime(tmp_path) as (client, address):
        await one_of_each(client)
        shown = await shown_at_last(
            address, {"amends_requests_refused_total", "amends_breaker_transitions_total"}
        )
    assert {metric.prometheus_series for metric in TABLE if metric.kind is not Kind.HISTOGRAM} <= (
        shown.names
    )
    queries = [*expressions(), *questions()]
    assert len(queries) > LEAST_PANELS
    faults = []
    for where, query in queries:
        selectors, grouped = selectors_of(query)
        faults += [f"{where}: {fault}" for fault in faults_of(selectors, grouped, shown)]
    assert faults == []


def selectors_of(query: str) -> tuple[list[Asked], set[str]]:
    """A query's selectors, and the labels that it groups by; also of `label_values(...)`."""
    selectors, grouped = asked(query)
    if query.startswith("label_values("):
        *selectors, label = selectors
        grouped = {label.name}
    return selectors, grouped


def faults_of(selectors: list[Asked], grouped: set[str], shown: Scrape) -> Iterator[str]:
    """What of a query a runtime does not show."""
    own: set[str] = set()
    for name, matchers in selectors:
        if name == "up":
            continue  # Prometheus' own
        series = [one.labels for one in shown.series if one.name == name]
        if not series:
            yield f"there is no {name}"
            continue
        own |= {label for labels in series for label in labels}
        for matcher in matchers:
            if matcher.label in OF_PROMETHEUS:
                continue
            if not any(matcher.label in labels for labels in series):
                yield f"{name} has no label {matcher.label}"
        mine = [matcher for matcher in matchers if matcher.label not in OF_PROMETHEUS]
        if not any(fits(mine, labels) for labels in series):
            yield f"no series of {name} fits {mine}"
    for label in grouped - own - OF_PROMETHEUS:
        yield f"nothing that it asks for has a label {label}"


def fits(matchers: list[Matcher], labels: Mapping[str, str]) -> bool:
    """Whether a series has these labels; the dashboard's variables stand for whatever there is."""
    for label, operator, value in matchers:
        here = labels.get(label, "")
        if value.startswith("$"):
            continue
        found = re.fullmatch(value, here) is not None if "~" in operator else here == value
        if found == operator.startswith("!"):
            return False
    return True


# -- the reading of queries itself -----------------------------------------------------------------


def test_a_query_that_asks_for_too_much_is_found() -> None:
    """A test that finds nothing must be able to find something."""
    shown = Scrape(())
    selectors, grouped = selectors_of("sum by (saga) (rate(amends_saga_begins_total[5m]))")
    assert list(faults_of(selectors, grouped, shown)) == [
        "there is no amends_saga_begins_total",
        "nothing that it asks for has a label saga",
    ]


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ('a_total{state="open",instance=~"$instance"}', None),
        ('a_total{state=~"open|shut"}', None),
        ('a_total{state!="shut"}', None),
        ("a_total{kind=~'x'}", ValueError),
        ('a_total{state="opened"}', "no series of a_total fits"),
        ('a_total{state!~"open|shut"}', "no series of a_total fits"),
        ('a_total{kind="x"}', "a_total has no label kind"),
        ("sum by (kind) (rate(a_total[5m]))", "has a label kind"),
        ("rate(a[5m])", "there is no a"),
    ],
)
def test_names_labels_and_values_are_compared(
    query: str, fault: str | type[ValueError] | None
) -> None:
    """With one series, of which everything is known."""
    shown = Scrape((Series("a_total", {"state": "open"}, 1.0),))
    if isinstance(fault, type):
        with pytest.raises(fault):
            selectors_of(query)
        return
    faults = list(faults_of(*selectors_of(query), shown))
    assert bool(faults) == (fault is not None)
    if fault is not None:
        assert fault in faults[0]


@pytest.mark.parametrize(
    ("query", "names", "labels"),
    [
        ("up", ["up"], set()),
        ('a{b="c",d!~"e|f"} > 0', ["a"], set()),
        ("histogram_quantile(0.5, sum by (le) (rate(a_bucket[5m])))", ["a_bucket"], {"le"}),
        ("sum(a and on (b) c) / 1024 ^ 3", ["a", "c"], {"b"}),
        ("min_over_time(a[15m]) > 128 * 1024", ["a"], set()),
        ("sum by (b) (a unless a offset 1h) > 0", ["a", "a"], {"b"}),
    ],
    ids=["name", "selector", "quantile", "join", "range", "offset"],
)
def test_queries_are_read(query: str, names: list[str], labels: set[str]) -> None:
    """Names of metrics are told from functions, operators and labels."""
    selectors, grouped = asked(query)
    assert [selector.name for selector in selectors] == names
    assert grouped == labels


@pytest.mark.parametrize("query", ["deriv(a[5m])", "a{b}", "a[5q]", "sum by le (a)"])
def test_what_cannot_be_read_is_refused(query: str) -> None:
    """Rather than taken for something else."""
    with pytest.raises(ValueError, match=r"."):
        asked(query)


# -- the files by themselves -----------------------------------------------------------------------


def test_the_dashboard_can_be_imported() -> None:
    """Unique ids, a place for each panel, and no data source but the one that is chosen on top."""
    board = dashboard()
    ids = [panel["id"] for panel in panels()]
    assert len(ids) > LEAST_PANELS
    assert len(set(ids)) == len(ids)
    assert board["id"] is None
    assert board["uid"]
    rows = [panel["title"].partition(":")[0] for panel in panels() if panel["type"] == "row"]
    assert rows == ["Business", "Participants", "Runtime", "Trouble", "Two-phase commits"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert any(
        (one["name"], one["type"]) == ("datasource", "datasource")
        for one in board["templating"]["list"]
    )
    for place in sources_in(board):
        assert place == source
    for panel in panels():
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["datasource"] == source
        assert [target["refId"] for target in panel["targets"]] == sorted(
            {target["refId"] for target in panel["targets"]}
        )
    cells = [
        (x, y)
        for panel in panels()
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24


def sources_in(node: object) -> Iterator[object]:
    """Every data source that is named anywhere in the dashboard."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "datasource":
                yield value
            else:
                yield from sources_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from sources_in(value)


def test_variables_that_queries_use_are_defined() -> None:
    """`$definition` and the like are variables of the dashboard."""
    defined = {one["name"] for one in dashboard()["templating"]["list"]}
    used = {
        name
        for _, query in [*expressions(), *questions()]
        for name in re.findall(r"\$(\w+)", query)
        if not name.startswith("__")
    }
    assert used == defined - {"datasource"}


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    """A summary, a description, who is to be told, and a section of the page that exists."""
    page = PAGE.read_text(encoding="utf-8")
    sections = {f"#{title.lower()}" for title in re.findall(r"^### (\w+)$", page, re.MULTILINE)}
    assert {f"#{rule['alert'].lower()}" for rule in rules()} == sections
    for rule in rules():
        assert re.fullmatch(r"Amends[A-Za-z]+", rule["alert"])
        assert rule["labels"]["severity"] in {"page", "ticket"}
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook_url"}
        assert notes["summary"]
        assert notes["description"]
        assert notes["runbook_url"] == f"{RUNBOOKS}docs/metrics.md#{rule['alert'].lower()}"
        assert re.fullmatch(r"\d+m", rule.get("for", "0m"))


async def test_the_page_s_line_puts_a_place_of_one_s_own_into_every_alert() -> None:
    """A link that leads nowhere is noticed at night."""
    (line,) = re.findall(r"^(sed .*) > alerts.yaml$", PAGE.read_text("utf-8"), re.MULTILINE)
    ran = await anyio.run_process(shlex.split(line), cwd=ROOT)
    changed = yaml.safe_load(ran.stdout)["groups"]
    urls = [rule["annotations"]["runbook_url"] for group in changed for rule in group["rules"]]
    assert len(urls) == len(rules())
    assert not any("example" in url for url in urls)
    assert all(re.fullmatch(r"https://\S+/docs/metrics\.md#amends[a-z]+", url) for url in urls)


def test_every_alert_has_a_test_for_promtool() -> None:
    """Of the states in which it fires, and of those in which it does not."""
    tests = yaml.safe_load(ALERTS_TEST.read_text(encoding="utf-8"))["tests"]
    named = [test["name"].partition(",")[0] for test in tests]
    assert set(named) == {rule["alert"] for rule in rules()}
    for test in tests:
        alert = test["name"].partition(",")[0]
        fires = [str(each) for each in test.get("promql_expr_test", []) if "exp_samples" in each]
        fires += [each["alertname"] for each in test.get("alert_rule_test", [])]
        assert any(alert in each for each in fires), test["name"]


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: set PROMTOOL to one")
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "--lint=all", "--lint-fatal", str(ALERTS)),
        ("check", "config", "--syntax-only", str(COMPOSE / "prometheus.yaml")),
        ("test", "rules", str(ALERTS_TEST)),
    ],
    ids=["rules", "config", "alerts"],
)
async def test_prometheus_takes_them(arguments: tuple[str, ...]) -> None:
    """Its own tool reads the rules and the configuration, and tries each alert."""
    assert PROMTOOL is not None
    ran = await anyio.run_process([PROMTOOL, *arguments], check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr).decode()


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: set PROMTOOL to one")
async def test_promtool_finds_no_fault_in_what_a_runtime_shows(tmp_path: Path) -> None:
    """Names, units and types of the metrics are as Prometheus would have them."""
    assert PROMTOOL is not None
    async with a_runtime(tmp_path) as (client, address):
        await one_of_each(client)
        page = await anyio.to_thread.run_sync(get, address)
    command = [PROMTOOL, "check", "metrics"]
    ran = await anyio.run_process(command, input=page.text.encode(), check=False)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, b"")


def test_alerts_fill_in_only_labels_that_their_query_leaves() -> None:
    """`{{ $labels.x }}` is empty where the query has aggregated x away."""
    for rule in rules():
        selectors, grouped = asked(rule["expr"])
        used = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        aggregated = re.search(r"\b(sum|max|min|avg|count)\b", rule["expr"]) is not None
        assert selectors
        assert used <= (grouped if aggregated else OF_PROMETHEUS), rule["alert"]


def test_the_page_has_the_metrics_that_there_are() -> None:
    """scripts/gen_metrics_docs.py writes its table."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == current(page), "run scripts/gen_metrics_docs.py"
