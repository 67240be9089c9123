"""What a runtime shows to Prometheus, read over HTTP as Prometheus does."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import anyio.to_thread
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Page", "Scrape", "Series", "get", "openmetrics_families", "scrape", "scraped"]

PATIENCE_S = 60  # bounds a test that hangs; nothing is measured by it


class Page(NamedTuple):
    """An answer."""

    status: int
    content_type: str
    text: str


class Series(NamedTuple):
    """One line of it."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Scrape:
    """Everything that was shown at one moment."""

    series: tuple[Series, ...]

    def values(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """The series of this name with these labels, by their other labels' values."""
        return {
            tuple(text for key, text in sorted(one.labels.items()) if key not in labels): one.value
            for one in self.series
            if one.name == name and labels.items() <= one.labels.items()
        }

    def value(self, name: str, **labels: str) -> float:
        """All of them together."""
        return sum(self.values(name, **labels).values())

    @property
    def names(self) -> set[str]:
        """The names of everything that is shown."""
        return {one.name for one in self.series}


def get(address: str, path: str = "/metrics", *, method: str = "GET", accept: str = "") -> Page:
    """One request, in this thread."""
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    if accept:
        request.add_header("Accept", accept)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310  # http
            return Page(answer.status, answer.headers["Content-Type"], answer.read().decode())
    except urllib.error.HTTPError as refused:
        with refused:
            return Page(refused.code, refused.headers["Content-Type"], refused.read().decode())


def scraped(text: str) -> Scrape:
    """The series of a page."""
    return Scrape(tuple(_series(text)))


def openmetrics_families(text: str) -> set[str]:
    """The names of a page's families, as the strict parser of OpenMetrics reads it."""
    families = openmetrics_parser.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return {family.name for family in families}


async def scrape(address: str) -> Scrape:
    """What is shown there now; asked in a thread, because the runtime may run in this one."""
    page = await anyio.to_thread.run_sync(get, address)
    assert page.status == 200
    return scraped(page.text)


def _series(text: str) -> Iterator[Series]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield Series(sample.name, sample.labels, sample.value)
