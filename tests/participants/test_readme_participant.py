"""The participant of the README works as it stands, in 25 lines."""

import importlib.util
from pathlib import Path

import pytest

from amends import Participant, Verb, serve
from tests.participants.asking import asking, call_message, json_payload
from tests.participants.processes import PROGRAMS

SOURCE = PROGRAMS / "readme_participant.py"


def test_it_has_25_lines() -> None:
    """And no more."""
    assert len(SOURCE.read_text().splitlines()) <= 25


async def test_it_charges_declines_and_refunds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its database is made in the current folder."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("readme_participant", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    payments: Participant = module.payments
    too_much = call_message(saga_id="rich")
    too_much.input.CopyFrom(json_payload({"cents": 100_001}))
    charge, refund = call_message(), call_message(Verb.COMPENSATE, own_result={"charged": 4200})
    for call in (charge, refund):
        call.input.CopyFrom(json_payload({"cents": 4200}))
    async with serve(payments) as server, asking(server.address) as asker:
        assert await asker.say(too_much) == "rejected card_declined"
        assert (await asker.ask(charge)).done.result.data == b'{"charged":4200}'
        assert await asker.say(refund) == "done"
    assert (tmp_path / "payments.db").exists()
