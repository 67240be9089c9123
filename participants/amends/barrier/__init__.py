"""Barriers: what makes repeated, empty and late calls harmless.

A barrier writes one row for each verb of a step, in the *same local transaction* as the effect, or
as the refusal. So the effect and the memory of it live and die together, whatever is killed when.

`verdict.py` has the rules, pure and the same for all; `port.py` says what a barrier is; beside them
lies one file for each database.
"""

from amends.barrier.port import Barrier

__all__ = ["Barrier"]
