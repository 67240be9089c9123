"""The participant without a barrier of docs/participants.md is run as it stands there."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

import amends
from amends_runtime.config import Config, Participant, Server
from amends_runtime.engine import run_engine
from tests.participants.asking import asking, call_message, call_of, json_payload

PAGE = Path(__file__).parents[2] / "docs" / "participants.md"


class RentalCompany(ThreadingHTTPServer):
    """Somebody else's API: does the same key once, and answers it with the rental as it is now."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.rentals: dict[str, dict[str, str]] = {}
        """By the key under which each was made."""
        self.keys: list[str] = []
        """As they came, of requests that were answered or lost."""
        self.first_state = "rented"
        self.is_busy = False
        """It answers that another request with the key is under way."""
        self.refuses = False
        self.keeps_rentals = False
        self.loses_answers = 0

    def answer(self, path: str, key: str) -> tuple[int, dict[str, str]]:
        """Rent or cancel."""
        self.keys.append(key)
        if path == "/rentals":
            if self.is_busy:
                return 409, {}
            if self.refuses:
                return 410, {}
            new = {"id": f"r{len(self.rentals) + 1}", "state": self.first_state}
            return 200, self.rentals.setdefault(key, new)
        if self.keeps_rentals:
            return 410, {}
        (rental,) = [r for r in self.rentals.values() if path == f"/rentals/{r['id']}/cancel"]
        rental["state"] = "cancelled"
        return 200, rental

    @property
    def states(self) -> list[str]:
        """Where its rentals stand."""
        return [rental["state"] for rental in self.rentals.values()]


class _Asked(BaseHTTPRequestHandler):
    server: RentalCompany

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, rental = self.server.answer(self.path, self.headers["Idempotency-Key"])
        if self.server.loses_answers:
            self.server.loses_answers -= 1
            return  # the connection closes without a word
        body = json.dumps(rental).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its name there
        """Say nothing."""


@pytest.fixture
def company() -> Iterator[RentalCompany]:
    """Serve the API on a free port."""
    with RentalCompany() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def page(tmp_path: Path, company: RentalCompany, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the page's code; its API is the one above."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (code,) = re.findall(r"```python\n(# cars.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "cars.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("page_cars", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "API", f"http://127.0.0.1:{company.server_port}")
    return module


def message(verb: amends.Verb = amends.Verb.EXECUTE) -> Any:
    """Make the call of a trip that wants a car."""
    call = call_message(verb, action="rent", step="car")
    call.input.CopyFrom(json_payload({"car": "small"}))
    return call


EXECUTE_KEY = "store/order-1/car/execute/1"
COMPENSATE_KEY = "store/order-1/car/compensate/1"


@pytest.mark.parametrize("verb", amends.Verb, ids=str)
def test_every_verb_finds_the_key_of_execute(verb: amends.Verb) -> None:
    """Of the same step and round; in Execute it is the call's own."""
    call = call_of(verb, step="car", round=3)
    assert call.execute_key == "store/order-1/car/execute/3"
    assert (call.execute_key == call.idempotency_key) is (verb is amends.Verb.EXECUTE)


async def test_a_rental_that_takes_long_is_asked_for_until_it_is_there(
    page: ModuleType, company: RentalCompany
) -> None:
    """Every call asks under the same key, so there is one rental."""
    company.first_state = "pending"
    async with amends.serve(page.cars) as server, asking(server.address) as asker:
        assert await asker.say(message()) == "in_progress"
        assert await asker.say(message()) == "in_progress"
        company.rentals[EXECUTE_KEY]["state"] = "rented"
        assert (await asker.ask(message())).done.result.data == b'{"rental":"r1"}'
        assert await asker.say(message(amends.Verb.COMPENSATE)) == "done"
    assert company.states == ["cancelled"]


async def test_a_lost_answer_is_unknown_and_found_again(
    page: ModuleType, company: RentalCompany
) -> None:
    """The car is rented, nobody knows, and the compensation cancels it all the same."""
    company.loses_answers = 1
    async with amends.serve(page.cars) as server, asking(server.address) as asker:
        code, _ = await asker.status(message())
        assert code is grpc.StatusCode.UNKNOWN
        assert company.states == ["rented"]
        assert await asker.say(message(amends.Verb.COMPENSATE)) == "done"
    assert company.states == ["cancelled"]
    assert company.keys == [EXECUTE_KEY, EXECUTE_KEY, COMPENSATE_KEY]


async def test_a_compensation_that_comes_first_forbids_what_comes_late(
    page: ModuleType, company: RentalCompany
) -> None:
    """In whatever way the late one comes: as a call, or as a request that was on its way."""
    async with amends.serve(page.cars) as server, asking(server.address) as asker:
        assert await asker.say(message(amends.Verb.COMPENSATE)) == "done"
        assert await asker.say(message()) == "rejected fenced"
    assert company.answer("/rentals", EXECUTE_KEY)[1]["state"] == "cancelled"
    assert company.states == ["cancelled"]


async def test_what_was_refused_has_nothing_to_undo(
    page: ModuleType, company: RentalCompany
) -> None:
    """There is no rental to cancel."""
    company.refuses = True
    async with amends.serve(page.cars) as server, asking(server.address) as asker:
        assert await asker.say(message()) == "rejected no_car"
        assert await asker.say(message(amends.Verb.COMPENSATE)) == "done"
    assert company.rentals == {}


async def test_a_key_that_is_busy_is_no_refusal(page: ModuleType, company: RentalCompany) -> None:
    """Neither verb has an outcome then: both are asked again."""
    company.is_busy = True
    async with amends.serve(page.cars) as server, asking(server.address) as asker:
        for verb in (amends.Verb.EXECUTE, amends.Verb.COMPENSATE):
            code, _ = await asker.status(message(verb))
            assert code is grpc.StatusCode.UNKNOWN


async def test_a_cancellation_that_is_refused_is_not_done(
    page: ModuleType, company: RentalCompany
) -> None:
    """A person has to look."""
    company.keeps_rentals = True
    async with amends.serve(page.cars) as server, asking(server.address) as asker:
        await asker.ask(message())
        assert await asker.say(message(amends.Verb.COMPENSATE)) == "broken not_cancelled"


async def test_a_trip_that_turns_back_leaves_no_rental(
    page: ModuleType, company: RentalCompany, tmp_path: Path
) -> None:
    """The runtime's own keys are what `Call.execute_key` says they are."""
    hotels = amends.Participant("hotels", barrier=None)

    @hotels.execute("book", compensatable=False)
    def book(call: amends.Call) -> None:
        raise amends.Rejected("full")

    trip = amends.Definition("trip").step("car", "cars", "rent").pivot("hotel", "hotels", "book")
    async with amends.serve(page.cars) as cars, amends.serve(hotels) as other:
        config = Config(
            server=Server(listen="127.0.0.1:0", database=str(tmp_path / "amends.db")),
            participants={
                "cars": Participant(address=cars.address),
                "hotels": Participant(address=other.address),
            },
        )
        async with run_engine(config) as engine, amends.Client(engine.address) as client:
            await client.register(trip)
            started = await client.start("trip", {"car": "small"}, saga_id="trip-1")
            saga = await started.result(timeout_s=30)
            store_id = (await client.runtime()).store_id
    assert saga.state is amends.SagaState.COMPENSATED
    assert company.states == ["cancelled"]
    key = f"{store_id}/trip-1/car"
    assert company.keys == [f"{key}/execute/1", f"{key}/execute/1", f"{key}/compensate/1"]
