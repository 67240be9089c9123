"""How one definition differs from another, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator

from amends_runtime.core.definition import Definition, RetryPolicy, Step, normalise

__all__ = ["differences"]


def differences(before: Definition, after: Definition) -> list[str]:
    """One line per difference of meaning; none for two texts of one content."""
    return list(_differences(normalise(before), normalise(after)))


def _differences(before: Definition, after: Definition) -> Iterator[str]:
    for field in ("mode", "deadline_ms", "retention_ms"):
        yield from _changed("", field, getattr(before, field), getattr(after, field))
    old = {step.name: step for step in before.steps}
    new = {step.name: step for step in after.steps}
    yield from (f"step {name!r} is gone" for name in old if name not in new)
    yield from (f"step {name!r} is new" for name in new if name not in old)
    kept = [name for name in new if name in old]
    if kept != [name for name in old if name in new]:
        yield f"steps that both have stand in another order: {', '.join(kept)}"
    for name in kept:
        yield from _step_differences(old[name], new[name])


def _step_differences(before: Step, after: Step) -> Iterator[str]:
    where = f"step {before.name!r}: "
    for field in ("kind", "participant", "action", "after", "uses", "timeout_ms"):
        yield from _changed(where, field, getattr(before, field), getattr(after, field))
    for field in ("retry", "compensation_retry"):
        yield from _policy_differences(
            f"{where}{field}.", getattr(before, field), getattr(after, field)
        )


def _policy_differences(where: str, before: RetryPolicy, after: RetryPolicy) -> Iterator[str]:
    for field in ("first_ms", "factor", "max_ms", "give_up_after_ms"):
        yield from _changed(where, field, getattr(before, field), getattr(after, field))


def _changed(where: str, field: str, before: object, after: object) -> Iterator[str]:
    if before != after:
        yield f"{where}{field} was {_shown(before)}, becomes {_shown(after)}"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "nothing"
    return str(getattr(value, "value", value))
