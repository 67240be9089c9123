"""Write the table of docs/metrics.md from the metrics that there are, or check it.

    gen_metrics_docs.py           write it
    gen_metrics_docs.py --check   write nothing; fail if it is not current

Exit codes: 0 written, or current; 1 not current; 2 usage.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from amends_runtime.telemetry.metrics import TABLE, Kind, Metric

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
BEGIN, END = "<!-- metrics:begin -->", "<!-- metrics:end -->"


def main() -> int:
    """Write the page, or say that it is not what it would be."""
    parser = argparse.ArgumentParser(description="Write docs/metrics.md's table, or check it.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = current(before)
    if before == after:
        return 0
    if arguments.check:
        print(f"{PAGE.name} is not current: run scripts/gen_metrics_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(after, encoding="utf-8")
    return 0


def current(page: str) -> str:
    """The page with the table as it has to be."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join([head + BEGIN, *table(), END + tail])


def table() -> Iterator[str]:
    """One row for each metric."""
    yield "| OpenTelemetry | Prometheus | kind, unit | labels | |"
    yield "| --- | --- | --- | --- | --- |"
    for metric in TABLE:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        unit = f"{metric.kind.value}, {metric.unit}"
        yield (
            f"| `{metric.name}` | {series(metric)} | {unit} | {labels} |"
            f" {metric.description.replace('|', ' or ')} |"
        )


def series(metric: Metric) -> str:
    """What a query says."""
    if metric.kind is Kind.HISTOGRAM:
        return f"`{metric.prometheus_series}` `_bucket` `_count` `_sum`"
    return f"`{metric.prometheus_series}`"


if __name__ == "__main__":
    sys.exit(main())
