"""A stream that is cut at every byte of a batch of replies loses nothing and doubles nothing.

With a real participant, its barrier, a real runtime and real connections. `make cuts` cuts more.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.network.stream_cuts import REPLIES, REQUESTS, UNDOINGS, opened

pytestmark = pytest.mark.anyio


async def test_each_effect_happens_once_wherever_its_reply_is_cut(tmp_path: Path) -> None:
    """Every byte of a batch of three; the sagas go on by themselves and complete."""
    async with opened(tmp_path) as cuts:
        await cuts.cut_everywhere(REPLIES)
        report = cuts.audit()
    assert not report.wrong
    assert not report.missing(REPLIES)
    assert {*report.members[REPLIES.name]} == {3}
    assert report.cuts.total() > max(report.lengths[REPLIES.name])


async def test_each_compensation_happens_once_wherever_its_reply_is_cut(tmp_path: Path) -> None:
    """A sample of the bytes of a batch of three; the sagas are refused, and compensated."""
    async with opened(tmp_path) as cuts:
        await cuts.cut_sometimes(UNDOINGS, 12)
        report = cuts.audit()
    assert not report.wrong
    assert len(report.offsets[UNDOINGS.name]) > 8


async def test_each_effect_happens_once_wherever_its_call_is_cut(tmp_path: Path) -> None:
    """A sample of the bytes of a batch of calls, its begin and its end among them."""
    async with opened(tmp_path) as cuts:
        await cuts.cut_sometimes(REQUESTS, 16)
        report = cuts.audit()
    assert not report.wrong
    assert len(report.offsets[REQUESTS.name]) > 12
