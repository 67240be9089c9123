"""`amends` with a bug: deciding about a cancellation fails, with its input in the error's text.

python buggy_runtime.py serve …
"""

import sys
from typing import Any

from amends_runtime.cli.app import run
from amends_runtime.core import saga as core
from amends_runtime.core.definition import Plan
from amends_runtime.core.messages import CancelSaga

decide = core.decide


def decide_with_a_bug(
    plan: Plan, saga: core.Saga | None, message: Any, now_ms: int, epoch: int
) -> core.Decision:
    """Decide, but for cancellations."""
    if saga is not None and isinstance(message, CancelSaga):
        raise RuntimeError(saga.input.data, message.reason)
    return decide(plan, saga, message, now_ms, epoch)


if __name__ == "__main__":
    core.decide = decide_with_a_bug
    sys.exit(run(sys.argv[1:]))
