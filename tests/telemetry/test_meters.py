"""The meters: one writer counts, readers in other threads always see whole numbers."""

import sys
import threading

import pytest

from amends_runtime.telemetry.meters import OVERFLOW, SERIES_LIMIT, Counter, Histogram


def test_a_counter_adds_per_labels() -> None:
    """Each combination of labels is a series of its own."""
    counter = Counter(labels=2)
    counter.add(("order", "completed"))
    counter.add(("order", "completed"), 2)
    counter.add(("order", "compensated"))
    assert counter.values() == {("order", "completed"): 3, ("order", "compensated"): 1}


def test_without_labels_there_is_a_zero_from_the_start() -> None:
    """A rate over a series that is not there says nothing; over a zero it says zero."""
    assert Counter().values() == {(): 0}
    [empty] = Histogram((1.0, 2.0)).values().values()
    assert (empty.buckets, empty.total, empty.count) == ((0, 0, 0), 0.0, 0)


def test_a_histogram_puts_a_value_into_the_first_bucket_that_holds_it() -> None:
    """A bound belongs to its own bucket, as Prometheus' `le` says; the last one is open above."""
    histogram = Histogram((0.1, 1.0), labels=1)
    for number in (0.05, 0.1, 0.1001, 1.0, 7.0):
        histogram.record(number, ("a",))
    [value] = histogram.values().values()
    assert value.buckets == (2, 2, 1)
    assert value.count == 5
    assert value.total == pytest.approx(8.2501)


def test_what_was_read_does_not_change_any_more() -> None:
    """A reader works on its own copy."""
    counter, histogram = Counter(labels=1), Histogram((1.0,), labels=1)
    counter.add(("a",))
    histogram.record(0.5, ("a",))
    counted, recorded = counter.values(), histogram.values()
    counter.add(("a",))
    histogram.record(0.5, ("a",))
    assert counted == {("a",): 1}
    assert recorded[("a",)].buckets == (1, 0)


def test_one_series_too_many_goes_where_all_the_others_go() -> None:
    """Whoever registers a definition for each saga fills no memory, and nothing is lost."""
    counter, histogram = Counter(labels=2), Histogram((1.0,), labels=2)
    for number in range(SERIES_LIMIT + 5):
        counter.add((f"d{number}", "x"))
        histogram.record(0.5, (f"d{number}", "x"))
    other = (OVERFLOW, OVERFLOW)
    assert len(counter.values()) == len(histogram.values()) == SERIES_LIMIT + 1
    assert counter.values()[other] == counter.overflowed == 5
    assert histogram.values()[other].count == histogram.overflowed == 5
    counter.add(("d0", "x"))
    assert counter.values()["d0", "x"] == 2, "who was there before goes on being counted"


def test_a_reader_in_another_thread_is_never_disturbed() -> None:
    """New series come while it reads: no error, no number that falls, a count that fits."""
    counter, histogram = Counter(labels=1), Histogram((0.25, 0.5, 0.75), labels=1)
    done = threading.Event()
    faults: list[object] = []

    def read() -> None:
        seen: dict[tuple[str, ...], float] = {}
        try:
            while not done.is_set():
                values = counter.values()
                faults.extend(key for key, before in seen.items() if values[key] < before)
                seen = dict(values)
                faults.extend(
                    value
                    for value in histogram.values().values()
                    if len(value.buckets) != 4 or value.total > value.count
                )
        except RuntimeError as error:  # as "dictionary changed size during iteration"
            faults.append(error)

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as many changes of threads as there can be
    readers = [threading.Thread(target=read) for _ in range(3)]
    try:
        for reader in readers:
            reader.start()
        for number in range(20_000):
            counter.add((str(number % 1_500),))
            histogram.record((number % 100) / 100, (str(number % 1_500),))
    finally:
        done.set()
        sys.setswitchinterval(interval_s)
        for reader in readers:
            reader.join()
    assert faults == []
    assert sum(counter.values().values()) == 20_000
