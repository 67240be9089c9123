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
    if before.two_phase is not None and after.two_phase is not None:
        for field in ("ordered", "locked_retries"):
            old_value, new_value = (getattr(each.two_phase, field) for each in (before, after))
            yield from _changed("", f"two_phase.{field}", old_value, new_value)
    old = {step.name: step for step in before.steps}
    new = {step.name: step for step in after.steps}
    yield from (f"step {name!r} is gone" for name in old if name not in new)
    yield from (f"step {name!r} is new" for name in new if name not in old)
    kept = [name for name in new if name in old]
    if kept != [name for name in old if name in new]:
        yield f"steps that both have stand in another order: {', '.join(kept)}"
    for name in kept:
        # A two-phase commit's steps have no order of their own: it is drawn from `ordered`.
        is_drawn = after.two_phase is not None
        yield from _step_differences(old[name], new[name], is_drawn=is_drawn)


def _step_differences(before: Step, after: Step, *, is_drawn: bool) -> Iterator[str]:
    where = f"step {before.name!r}: "
    order = () if is_drawn else ("after", "uses")
    for field in ("kind", "participant", "action", *order, "timeout_ms"):
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
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(value) or "nothing"
    return str(getattr(value, "value", value))
