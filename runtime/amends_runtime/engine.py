"""The composition root: the only file that knows every part.

A runtime comes up in this order, and goes down in the reverse of it:

    telemetry     what the environment says of it, and the port for metrics, before all else
    store         owned by lock and epoch, checkpointed, read back
    definitions   loaded, then those of the configuration registered
    lanes         one per participant, of the configuration or an operator's; nothing is called yet
    tasks         decider, committer, timers, loader; then recovery of what had not ended
    API           bound and SERVING

Going down: the API says NOT_SERVING and takes nothing new, calls on the wire get a moment for their
replies, every decided turn is committed, what waits for a collector gets a moment to leave, the
store is closed. What was still in flight then is
found as lost at the next start and asked again under the same keys: a stop needs no more care than
a crash.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from importlib import metadata

import anyio
import structlog
from anyio.abc import TaskGroup

from amends_runtime.actors.definitions import Definitions
from amends_runtime.actors.oldest_open import OldestOpen
from amends_runtime.actors.supervisor import Limits, Outbox, Supervisor
from amends_runtime.api.server import ApiServer, check_listen
from amends_runtime.clock import SystemClock
from amends_runtime.config import Config, Telemetry, Tls, read_tls
from amends_runtime.core.breaker import BreakerPolicy
from amends_runtime.core.definition import Definition
from amends_runtime.core.tracing import Tracing
from amends_runtime.dispatch.exchange import ExchangeTransport
from amends_runtime.dispatch.lanes import Lanes
from amends_runtime.dispatch.participants import Participants
from amends_runtime.dispatch.unary import UnaryTransport
from amends_runtime.ports import Caller, Clock, Observer, ParticipantAddress, Store, Transport
from amends_runtime.storage import SqliteStore, open_sqlite_store
from amends_runtime.telemetry.collector import SpanExport
from amends_runtime.telemetry.encoding import sender_attributes
from amends_runtime.telemetry.gauges import Sources
from amends_runtime.telemetry.observers import HistoryLog, Observers
from amends_runtime.telemetry.otel_variables import (
    Destination,
    Variables,
    find_destination,
    find_ratio,
    find_resource_attributes,
)
from amends_runtime.telemetry.outlets import MetricOutlets
from amends_runtime.telemetry.sending import SpanCounts
from amends_runtime.telemetry.traces import Traces

__all__ = ["Engine", "run_engine"]

_log = structlog.get_logger(__name__)

DRAIN_CALLS_S = 5.0  # a usual call's length; what takes longer is asked again after the restart
DRAIN_TURNS_S = 10.0  # far more than the longest commit
DRAIN_REQUESTS_S = 2.0  # handlers answer at once when the runtime stops
DRAIN_CHECK_S = 0.01
TELEMETRY_FLUSH_S = 2.0  # a collector that is there needs less, and one that is not gets no more


class Engine:
    """A runtime's parts over a store, a clock and a way to its participants.

    `run_engine` puts it over SQLite and gRPC and lets an API in front of it; tests and simulations
    put it over memory and virtual time. `load`, `open`, `run`, in this order.

    `connect` gives a participant's transport, or None where it must not be called: its calls wait.
    Its second argument tells since when there have been open sagas. `concurrency` is how many calls
    a participant gets at once, `tracing` which traces are sampled.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Clock,
        observer: Observer,
        connect: Callable[[ParticipantAddress, Callable[[], int]], Transport | Caller | None],
        breaker: BreakerPolicy | None = None,
        limits: Limits | None = None,
        concurrency: Mapping[str, int] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.store = store
        tracing = tracing or Tracing(store.identity.store_id)
        self._oldest_open = OldestOpen(store, clock)
        self.lanes = Lanes(
            policy=breaker or BreakerPolicy(),
            clock=clock,
            observer=observer,
            connect=lambda address: connect(address, lambda: self._oldest_open.at_ms),
            limits=concurrency or {},
        )
        self.participants = Participants(store, self.lanes, clock)
        self.definitions = Definitions(store, clock, self.lanes.names)
        self.supervisor = Supervisor(
            store,
            self.definitions,
            clock=clock,
            observer=observer,
            limits=limits or Limits(),
            outbox=_outbox(self.lanes),
            tracing=tracing,
        )
        self.address = ""
        self.metrics_address = ""
        """Where Prometheus finds the metrics; empty: nowhere."""
        self.metrics_to = ""
        """Where metrics are shown and sent, for people; empty: nowhere."""
        self.traces_to = ""
        """Which collector has the traces, for people; empty: none."""
        self.traces_ratio = tracing.ratio
        """The share of sagas whose trace is kept, from 0 to 1."""
        self._stop = anyio.Event()
        self._failure: BaseException | None = None

    async def load(self) -> None:
        """Reads what was registered before."""
        await self.definitions.load()
        await self.participants.load()

    def open(self, tasks: TaskGroup, addresses: Sequence[ParticipantAddress]) -> None:
        """Makes the lanes, whose workers live in `tasks`. Nothing is called yet.

        `addresses` are the configuration's; where an operator has said otherwise, that counts.
        """
        self.lanes.open(tasks, self.supervisor.deliver, self.participants.open(addresses))

    def run(self, tasks: TaskGroup) -> None:
        """Lets the parts run in `tasks`: what had not ended goes on, and new sagas may come."""
        for part in (
            self.supervisor.run_decider,
            self.supervisor.run_committer,
            self.supervisor.run_timers,
            self.supervisor.run_loader,
            self.supervisor.run_parking,
            self.supervisor.run_recovery,
            self._oldest_open.run,
            self.participants.run,
            self.store.keep_noted,
            self.store.wait_lost,
        ):
            tasks.start_soon(_guarded, self, part, name=part.__qualname__)

    def request_stop(self) -> None:
        """Begins the way down. `wait_stopped` returns; leaving `run_engine` does the rest."""
        self._stop.set()

    async def wait_stopped(self) -> None:
        """Until a stop is requested.

        Raises what made the runtime unable to go on, if anything did.
        """
        await self._stop.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def failed(self) -> bool:
        """Whether a part has died."""
        return self._failure is not None

    def fail(self, failure: BaseException) -> None:
        """A part has died: the runtime must not go on without it."""
        if self._failure is None:
            self._failure = failure
        self._stop.set()


@asynccontextmanager
async def run_engine(
    config: Config, definitions: Sequence[Definition] = (), *, restored: bool = False
) -> AsyncIterator[Engine]:
    """Runs a runtime for the length of the block; when the block is entered it serves.

    Registers `definitions` first. `restored`: the database came from a backup, and its lock file
    with it, so that only who starts the runtime can tell. Raises StoreError, InvalidRequest (a
    definition) or ConfigurationError (an address, a TLS file) with one clear message, before
    anything was done.
    """
    # Before the store is opened: a wrong address must not cost a database or an epoch.
    tls = read_tls(config)
    await check_listen(config.server.listen, insecure=config.server.insecure, tls=tls.server)
    for remark in tls.remarks:
        _log.warning(remark)
    try:
        async with _running(config, tls, definitions, restored=restored) as engine:
            yield engine
    except BaseExceptionGroup as group:
        # The task group wraps what was raised inside its block; callers want to catch it by type.
        failure: BaseException = group
        while isinstance(failure, BaseExceptionGroup) and len(failure.exceptions) == 1:
            failure = failure.exceptions[0]
        raise failure from None


@asynccontextmanager
async def _running(
    config: Config, tls: Tls, definitions: Sequence[Definition], *, restored: bool
) -> AsyncIterator[Engine]:
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        variables = Variables(os.environ)
        traces_to = find_destination(
            variables,
            "traces",
            endpoint=config.telemetry.otlp_endpoint,
            protocol=config.telemetry.otlp_protocol,
        )
        ratio = find_ratio(variables, config.telemetry.traces_ratio)
        sender = find_resource_attributes(variables, config.telemetry.service_name)
        try:
            # First, because its port can be taken, and then nothing else is to have happened.
            outlets = stack.enter_context(closing(_outlets(config.telemetry, variables)))
        finally:  # it may be a variable that was ignored why it is that port
            for remark in dict.fromkeys(variables.remarks):
                _log.warning(remark)
        store = await stack.enter_async_context(
            open_sqlite_store(config.server.database, restored=restored)
        )

        def connect(
            address: ParticipantAddress, oldest_open_ms: Callable[[], int]
        ) -> Transport | Caller | None:
            # By name: an operator who moves a participant must not move it into plain text.
            files = tls.participants.get(address.name)
            if address.tls and files is None:
                return None
            unary = UnaryTransport(
                address.address,
                store.identity,
                clock,
                max_result_bytes=config.limits.payload_bytes,
                oldest_open_ms=oldest_open_ms,
                tls=files,
            )
            configured = config.participants.get(address.name)
            if configured is not None and configured.transport == "unary":
                return unary
            return ExchangeTransport(
                address.name,
                unary,
                store.identity,
                max_result_bytes=config.limits.payload_bytes,
                oldest_open_ms=oldest_open_ms,
            )

        tracing = Tracing(
            store.identity.store_id,
            ratio=ratio,
            join=config.telemetry.caller_trace == "join",
        )
        traces = None if traces_to is None else _traces(traces_to, tracing, store, sender)
        if traces is not None:
            stack.push_async_callback(traces.close)
        history_log = HistoryLog(tracing, in_detail=config.log_level == "debug")
        engine = Engine(
            store,
            clock=clock,
            observer=Observers(
                [history_log, *outlets.observers, *([] if traces is None else [traces])]
            ),
            tracing=tracing,
            connect=connect,
            breaker=BreakerPolicy(
                failures_to_open=config.breaker.failures_to_open,
                open_ms=round(config.breaker.open_s * 1000),
                max_open_ms=round(config.breaker.max_open_s * 1000),
            ),
            limits=Limits(
                live_sagas=config.limits.live_sagas,
                park_after_ms=round(config.limits.park_after_s * 1000),
                mailbox=config.limits.mailbox,
                commit_batch=config.limits.commit_batch,
                commit_queue=config.limits.commit_queue,
            ),
            concurrency={
                name: one.concurrency
                for name, one in config.participants.items()
                if one.concurrency is not None
            },
        )
        await engine.load()
        async with anyio.create_task_group() as tasks:
            engine.open(
                tasks,
                [
                    ParticipantAddress(name, one.address, tls=name in tls.participants)
                    for name, one in config.participants.items()
                ],
            )
            stack.push_async_callback(engine.lanes.close)
            for definition in definitions:
                await engine.definitions.register(definition)
            server = ApiServer(
                config.server.listen,
                store,
                engine.supervisor,
                engine.definitions,
                engine.lanes,
                participants=engine.participants,
                max_payload_bytes=config.limits.payload_bytes,
                insecure=config.server.insecure,
                tls=tls.server,
                tracing=tracing,
                sender=sender,
            )
            # Whatever can be wrong has been said once the server has its port: nothing is decided
            # and no participant is called before that.
            engine.address = await server.start()
            engine.run(tasks)
            if traces is not None:
                engine.traces_to = traces.where
                tasks.start_soon(traces.run, name="traces")
            engine.metrics_address, engine.metrics_to = outlets.address, outlets.where
            await outlets.start(
                tasks, _sources(engine, store, traces), sender, store.identity.store_id
            )
            try:
                yield engine
            finally:
                with anyio.CancelScope(shield=True):
                    await _go_down(engine, server)
                    # Both at the same time: a collector that hangs costs the way down this once.
                    flushed_at_s = anyio.current_time() + TELEMETRY_FLUSH_S
                    await outlets.end()
                    if traces is not None:
                        await traces.close()
                    await outlets.wait_sent(max(0.0, flushed_at_s - anyio.current_time()))
                tasks.cancel_scope.cancel()


def _outbox(lanes: Lanes) -> Outbox:
    return Outbox(
        submit=lambda call, started_at_ms: lanes.of(call.participant).submit(call, started_at_ms),
        poll=lambda call, started_at_ms, poll: lanes.of(call.participant).poll(
            call,
            started_at_ms,
            poll.at_ms,
            poll.sent_at_ms,
            poll.polls,
            held_ms=poll.held_ms,
            sent_us=poll.sent_us,
        ),
        withdraw=lambda participant, saga_id, effect: lanes.of(participant).withdraw(
            saga_id, effect.step, effect.verb, effect.attempt
        ),
        forget=lambda participant, saga_id, steps: lanes.of(participant).forget(saga_id, steps),
        holds=lambda participant, saga_id, step, verb: lanes.of(participant).holds(
            saga_id, step, verb
        ),
    )


def _outlets(telemetry: Telemetry, variables: Variables) -> MetricOutlets:
    return MetricOutlets(
        variables,
        listen=telemetry.metrics_listen,
        otlp=telemetry.otlp_metrics,
        otlp_endpoint=telemetry.otlp_endpoint,
        otlp_protocol=telemetry.otlp_protocol,
    )


def _traces(to: Destination, tracing: Tracing, store: Store, sender: Mapping[str, str]) -> Traces:
    export = SpanExport(to, sender_attributes(store.identity.store_id, sender))
    return Traces(tracing, store, export, where=str(to))


def _sources(engine: Engine, store: SqliteStore, traces: Traces | None) -> Sources:
    def spans() -> dict[str, int]:
        return (SpanCounts(0, 0, 0) if traces is None else traces.counts())._asdict()

    return Sources(
        survey=engine.supervisor.survey,
        recovery=lambda: engine.supervisor.recovery,
        refused=lambda: engine.supervisor.refused,
        lanes=engine.lanes.status,
        sizes=lambda: (store.file_bytes, store.wal_bytes),
        spans=spans,
        identity=lambda: store.identity,
        version=metadata.version("amends"),
    )


async def _guarded(engine: Engine, part: Callable[[], Awaitable[object]]) -> None:
    """Runs a part for as long as the runtime lives.

    One that dies takes the runtime down, in order.
    """
    try:
        await part()
    except Exception as failure:  # noqa: BLE001  # whatever it was, the runtime ends in order
        _log.exception("part_died", part=getattr(part, "__name__", "?"))
        engine.fail(failure)


async def _go_down(engine: Engine, server: ApiServer) -> None:
    await server.refuse_new()
    engine.supervisor.stop_accepting()
    engine.lanes.stop_sending()
    await server.stop(DRAIN_REQUESTS_S)
    if engine.failed:
        return  # nothing more can be decided; the next start finds all of it
    with anyio.move_on_after(DRAIN_CALLS_S):
        while engine.lanes.in_flight:  # noqa: ASYNC110  # once in a lifetime
            await anyio.sleep(DRAIN_CHECK_S)
    with anyio.move_on_after(DRAIN_TURNS_S) as bound:
        await engine.supervisor.wait_idle()
    if bound.cancelled_caught:
        _log.error("stopped_with_undecided_messages", counts=engine.supervisor.counts())
