"""What metrics need of OpenTelemetry's SDK beside their values: who sends, and under which name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from amends_runtime.telemetry.encoding import SCOPE_NAME, sender_attributes

__all__ = ["SCOPE", "resource"]

SCOPE: Final = InstrumentationScope(SCOPE_NAME, metadata.version("amends"))
"""The instrumentation scope of all metrics of the runtime, as of its spans."""


def resource(store_id: str, attributes: Mapping[str, str]) -> Resource:
    """Who sends, as the SDK has it; see `sender_attributes`."""
    return Resource(sender_attributes(store_id, attributes))
