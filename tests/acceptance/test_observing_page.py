"""docs/observing.md says what is: its trees are those of real sagas, and its commands are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import anyio
import yaml

import amends
from amends import RecordKind
from amends_runtime.cli.app import build_app
from amends_runtime.config import Config
from amends_runtime.telemetry.projection import METHODS
from shop.catalogue import DECLINED_CARD
from tests.acceptance.traced import Traced
from tests.acceptance.world import PATIENCE_S
from tests.telemetry.trace_rules import CLIENT, Seen, Trace

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")

SHORT: Final = {method: f"…/{method.rpartition('/')[2]}" for method in METHODS.values()}
"""Names on the page."""

LEFT_OUT: Final = "[the other steps as above]"
"""A line of a tree on the page."""

LINE: Final = re.compile(r"^(?P<indent> *)(?P<name>\S.*?) {2,}(?P<service>\w+) {2,}[\d,.]+ m?s\b")
"""A line of a tree on the page: a span's name, its service, how long it took, and remarks."""


# -- the trees -------------------------------------------------------------------------------------


async def test_a_completed_saga_looks_like_that(traced: Traced) -> None:
    """Its page's tree, and the one of the command line."""
    started = await traced.world.start()
    await traced.world.end(started)
    assert_shown("completed", await traced.well_formed(started.saga_id))


async def test_a_compensated_saga_looks_like_that(traced: Traced) -> None:
    """The refusal, and the undoing."""
    started = await traced.world.start(card=DECLINED_CARD)
    await traced.world.end(started)
    assert_shown("compensated", await traced.well_formed(started.saga_id))


async def test_a_retried_saga_looks_like_that(traced: Traced) -> None:
    """Two attempts that failed, and one that did not."""
    traced.world.switch(payments={"charge": {"lose_reply": {"next": 2}}})
    started = await traced.world.start()
    await traced.world.end(started)
    assert_shown("retried", await traced.well_formed(started.saga_id))


async def test_a_saga_whose_participant_was_down_looks_like_that(traced: Traced) -> None:
    """Waits between the attempts."""
    await traced.world.take_down("shipping")
    started = await traced.world.start()
    await traced.wait_probe(started.saga_id)
    traced.world.switch()
    await traced.world.end(started)
    assert_shown("down", await traced.well_formed(started.saga_id))


async def test_a_saga_whose_runtime_was_killed_looks_like_that(traced: Traced) -> None:
    """The attempt that was lost, and the one after it."""
    world = traced.world
    world.switch(payments={"charge": {"hold": {"next": 1}}})
    struck = world.strikes("payments", "charge hold")
    started = await world.start()
    await world.wait_strike("payments", "charge hold", after=struck)
    await world.wait_record(started.saga_id, RecordKind.STEP_EXECUTED, "reserve")
    traced.kill_runtime()
    await world.runtime.start()
    world.switch()
    await world.end(started)
    assert_shown("killed", await traced.well_formed(started.saga_id, crashed=True))


async def test_a_saga_that_was_stuck_looks_like_that(traced: Traced) -> None:
    """Two lives of a step."""
    traced.world.switch(orders={"confirm": {"decline": {"next": 1}}})
    started = await traced.world.start()
    await traced.world.wait_record(started.saga_id, RecordKind.STEP_STUCK, "confirm")
    await started.retry(step="confirm", author="ada", reason="the shop is open again")
    await traced.world.end(started)
    assert_shown("stuck", await traced.well_formed(started.saga_id))


def assert_shown(what: str, trace: Trace) -> None:
    """Compare a tree of the page with a real one: each span's way from the root, and its service.

    How often the same one comes is left out: it is chance where a service was down. So are steps
    that a line of the page leaves out.
    """
    (block,) = re.findall(rf"<!-- tree: {what} -->\n```text\n(.*?)```", PAGE, re.DOTALL)
    on_page = set(ways_on_page(block))
    real = {way(trace, each) for each in trace.spans}
    if LEFT_OUT in block:
        steps = {each[1] for each in on_page if len(each) > 1}
        real = {each for each in real if len(each) == 1 or each[1] in steps}
    assert on_page == real, "\n".join(["the page should have:", *drawn(trace)])


def ways_on_page(block: str) -> Iterator[tuple[tuple[str, str], ...]]:
    """Give each line's way from the root."""
    above: list[tuple[str, str]] = []
    for line in block.splitlines():
        if line.lstrip().startswith(("·", LEFT_OUT)):
            continue  # an event, or nothing
        match = LINE.match(line)
        assert match is not None, line
        depth = len(match["indent"]) // 2
        above = [*above[:depth], (match["name"], match["service"])]
        yield tuple(above)


def way(trace: Trace, each: Seen) -> tuple[tuple[str, str], ...]:
    """Give a span's way from the root."""
    parent = trace.parent(each)
    above = () if parent is None else way(trace, parent)
    return (*above, (SHORT.get(each.name, each.name), each.service))


def drawn(trace: Trace) -> list[str]:
    """Draw a trace as the page does."""
    lines: list[str] = []

    def draw(each: Seen, depth: int) -> None:
        took_ms = (each.proto.end_time_unix_nano - each.proto.start_time_unix_nano) / 1e6
        name = f"{'  ' * depth}{SHORT.get(each.name, each.name)}"
        said = [each.text("amends.outcome")]
        if each.proto.kind == CLIENT:
            said.insert(0, f"attempt {each.number('amends.attempt')}:")
        if each.proto.status.message:
            said.append(f"(ERROR {each.proto.status.message})")
        said += [f"(links, {link})" for link in _links(each)]
        lines.append(f"{name:<32} {each.service:<10} {took_ms:7.1f} ms  {' '.join(said)}".rstrip())
        lines.extend(f"{'  ' * (depth + 1)}· {event.name}" for event in each.proto.events)
        for child in trace.children(each):
            draw(child, depth + 1)

    for root in trace.roots:
        draw(root, 0)
    return lines


def _links(each: Seen) -> Iterator[str]:
    for link in each.proto.links:
        for pair in link.attributes:
            yield pair.value.string_value


# -- the commands ----------------------------------------------------------------------------------


def commands() -> list[str]:
    """All lines of the page's blocks of commands."""
    blocks: list[str] = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


async def test_what_the_page_says_of_exporting_is_so(traced: Traced, tmp_path: Path) -> None:
    """Its commands on sagas that have ended: run as they stand, but for the addresses."""
    for saga_id, card in (("order-1", "4242"), ("order-3", "4242"), ("order-4", DECLINED_CARD)):
        await traced.world.end(await traced.world.start(saga_id=saga_id, card=card))
        await traced.well_formed(saga_id)
    ours = [line for line in commands() if line.startswith("amends trace ")]
    assert len(ours) >= 4
    before = len(traced.receiver.received.requests)
    for line in ours:
        command = line.replace("127.0.0.1:4317", traced.receiver.grpc_address)
        command = command.replace("http://127.0.0.1:4318", traced.receiver.http_url)
        command = re.sub(r"^amends", f"{shlex.quote(sys.executable)} -m amends_runtime", command)
        ran = await anyio.run_process(
            command,
            cwd=tmp_path,
            env=_plain_environment() | {"AMENDS_TARGET": traced.world.runtime.address},
        )
        if "--to" not in line and ">" not in line:
            assert ran.stdout, line
    assert len(traced.receiver.received.requests) > before
    # What was sent by hand comes a second time, and is the same.
    for saga_id in ("order-3", "order-4"):
        await traced.well_formed(saga_id, crashed=True)
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text())["resourceSpans"]


def test_all_other_commands_are_taken() -> None:
    """By the command line of amends, in a container or not, and by the demo."""
    app = build_app()
    seen = set()
    for line in commands():
        words = shlex.split(line.partition(" > ")[0].rpartition(" | ")[2])
        if words[:2] == ["docker", "compose"]:
            services = yaml.safe_load((ROOT / words[3]).read_text())["services"]
            assert words[2] == "--file", line
            if "exec" in words:
                after = [word for word in words[words.index("exec") + 1 :] if word != "-T"]
                assert after[0] in services, line
                words = after[1:]
            elif words[4] in {"kill", "start", "stop"}:
                assert words[-1] in services, line
        if words[0] == "amends":
            app.parse_args(words[1:], exit_on_error=False, print_error=False)
        elif words[0] == "make":
            assert words[1] == "demo", line
        seen.add(words[0])
    assert {"amends", "docker", "make"} <= seen


def test_what_the_page_configures_is_configured() -> None:
    """Its TOML is the runtime's, and its variables are OpenTelemetry's or ours."""
    import tomllib  # noqa: PLC0415  # only here

    for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL):
        values: dict[str, Any] = tomllib.loads(block)
        Config.model_validate(values)


async def test_what_the_page_says_to_search_for_is_there(traced: Traced) -> None:
    """Each tag by which it says to search is an attribute of spans that came."""
    saga = await traced.client.start("thoughtful", labels={"region": "eu"}, timeout_s=PATIENCE_S)
    await saga.result(timeout_s=PATIENCE_S)
    await traced.well_formed(saga.saga_id)
    refused = amends.Definition("refused", mode=amends.Mode.TWO_PHASE_COMMIT)
    await traced.client.register(refused.step("vote", "orders", "place"))  # which has no Prepare
    commit = await traced.client.start("refused", timeout_s=PATIENCE_S)
    await commit.result(timeout_s=PATIENCE_S)
    await traced.well_formed(commit.saga_id)
    keys = {key for span in traced.receiver.spans() for key in span.attributes}
    for tag in re.findall(r"`((?:amends|service)\.[a-z_.]+)=", PAGE):
        assert tag in keys, tag


def _plain_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AMENDS_", "OTEL_"))
    }
