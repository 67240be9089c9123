"""Page tokens and page sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amends.v1 import types_pb2
from amends_runtime.api.paging import (
    PAGE_BYTES,
    BadPageToken,
    fitting,
    question,
    token_for,
    token_from,
)

ASKED = question("sagas", "any")


@given(st.integers(0, 2**63 - 1))
def test_a_token_holds_its_position(position: int) -> None:
    """For the question that it was made for, and no other."""
    token = token_for(ASKED, position)
    assert token.isascii()
    assert token_from(ASKED, token) == position
    with pytest.raises(BadPageToken, match="another listing"):
        token_from(question("sagas", "other"), token)


@given(st.text(max_size=300) | st.binary(max_size=60).map(lambda b: b.hex()))
def test_no_text_breaks_the_reading_of_a_token(text: str) -> None:
    """Junk is refused with the mend."""
    with pytest.raises(BadPageToken, match="next_page_token"):
        token_from(ASKED, text)


@pytest.mark.parametrize("position", [-1, 2**63], ids=["negative", "beyond the store's numbers"])
def test_a_forged_position_is_refused(position: int) -> None:
    """What reaches the store is a number that it can have."""
    with pytest.raises(BadPageToken):
        token_from(ASKED, token_for(ASKED, position))


def payloads(*sizes: int) -> list[types_pb2.Payload]:
    """Messages of about these sizes."""
    return [types_pb2.Payload(data=bytes(size)) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "count", "fit"),
    [
        pytest.param([], 10, 0, id="none"),
        pytest.param([1] * 5, 10, 5, id="all"),
        pytest.param([1] * 5, 3, 3, id="the count"),
        pytest.param([PAGE_BYTES // 2 - 50] * 3, 10, 2, id="the bytes"),
        pytest.param([PAGE_BYTES * 2, 1], 10, 1, id="one that is too large comes alone"),
        pytest.param([1, PAGE_BYTES * 2], 10, 1, id="before one that is too large"),
    ],
)
def test_a_page_ends_at_its_count_or_its_bytes(sizes: list[int], count: int, fit: int) -> None:
    """Whichever comes first; and no page is empty while there are items."""
    items = payloads(*sizes)
    assert fitting(iter(items), count) == items[:fit]
