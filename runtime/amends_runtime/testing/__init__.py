"""For the tests of those who write sagas: the real runtime in the test, in virtual time.

    import amends
    from amends_runtime.testing import SagaTest

    def test_a_declined_card_returns_the_stock() -> None:
        with SagaTest(order) as test:
            test.participant("payments").execute("charge").rejects("card_declined")
            saga = test.run({"order_id": "A-1", "cents": 4200})
            assert saga.state == amends.SagaState.COMPENSATED
            assert test.course == ["execute reserve", "execute charge", "compensate reserve"]
            assert test.effects == []

    saga_test     SagaTest: what a test holds in its hands;  saga_under_test, one saga of it
    scripts       what participants answer;  answers, the words for it
    crashes       the same test with a crash of the runtime at every moment
    world         virtual time, the disk, and a runtime that can be killed
    service       a scripted participant's own side: barrier and ledger
    virtual_time  the event loop that never waits, and its clock

It needs no test framework. What it does not test is the wire and your own database: serve the real
participant with `amends.serve` for that.
"""

try:
    from amends_runtime.testing.answers import LostReply, NoReply, Slow, Status
    from amends_runtime.testing.crashes import CrashReport, check_every_crash, every_crash
    from amends_runtime.testing.errors import (
        CrashMatters,
        InsideEventLoop,
        InvalidScript,
        NotEnded,
        SagaTestError,
        UnusedScript,
    )
    from amends_runtime.testing.saga_test import SagaTest
    from amends_runtime.testing.saga_under_test import SagaUnderTest
    from amends_runtime.testing.scripts import ScriptedAction, ScriptedParticipant
except ModuleNotFoundError as missing:
    # `pip install amends` is the SDK: it brings this package, and not what the runtime needs.
    raise ModuleNotFoundError(
        f"amends_runtime.testing needs {missing.name}, which is not installed; run: pip install "
        "'amends[runtime]'",
        name=missing.name,
    ) from missing

__all__ = [
    "CrashMatters",
    "CrashReport",
    "InsideEventLoop",
    "InvalidScript",
    "LostReply",
    "NoReply",
    "NotEnded",
    "SagaTest",
    "SagaTestError",
    "SagaUnderTest",
    "ScriptedAction",
    "ScriptedParticipant",
    "Slow",
    "Status",
    "UnusedScript",
    "check_every_crash",
    "every_crash",
]
