"""kagzi: durable workflows on PostgreSQL whose steps run in parallel.

The way of a step, and the layout, in the order in which it passes:

    context     names a call and encodes its arguments        scope, registry, codec/
    engine/     keeps one run: what is recorded, what is live  runner, group, sleeping, executor
    _core       order, limits, rows, frames (Cython)           pool/: the processes that run bodies
    store/      writes the checkpoint, behind the fence        checkpoints, fenced, sql/
    worker/     claims runs, holds the lease                   heartbeat, incarnation
    client      starts runs and waits for them                 retrying

A module imports only from layers below its own; `tests/test_layers.py` holds the table.
"""

from kagzi._build_check import check as _check_build

_check_build()

from kagzi.client import Client, connect, run  # noqa: E402
from kagzi.context import Context  # noqa: E402
from kagzi.definition import Call, StepFunction, Workflow  # noqa: E402
from kagzi.errors import (  # noqa: E402
    AllStepsFailed,
    ChildFailed,
    CodecError,
    DuplicateName,
    EmbeddedServerFailed,
    EventTimeout,
    GroupTimeout,
    InvalidArguments,
    InvalidDefinition,
    InvalidDsn,
    InvalidInput,
    InvalidName,
    KagziError,
    LeaseLost,
    MissingMainGuard,
    NestingTooDeep,
    NonDeterminism,
    OutsideRun,
    PayloadKeyError,
    PayloadTooLarge,
    PoolStartFailed,
    PostgresNotFound,
    RunConflict,
    RunCrashed,
    RunEnded,
    RunFailed,
    RunWasCancelled,
    SchemaChanged,
    SchemaMissing,
    SchemaTooNew,
    ServerReplaced,
    ServerTooOld,
    StaleExtension,
    StepConflict,
    StepCrashed,
    StepFailed,
    StepTimeout,
    StoreError,
    StoreForbidden,
    StoreUnavailable,
    UnknownRun,
    UnknownSchedule,
    UnknownStep,
    UnknownWorkflow,
)
from kagzi.findings import BrokenRun, CheckProblem, CheckReport  # noqa: E402
from kagzi.handle import RunHandle  # noqa: E402
from kagzi.host import StepFuture, current_step  # noqa: E402
from kagzi.model import (  # noqa: E402
    AttemptRecord,
    CatchUp,
    ErrorStrategy,
    GroupRecord,
    Overlap,
    ParallelResult,
    QueueSummary,
    RunDetails,
    RunStatus,
    RunSummary,
    Schedule,
    StepInfo,
    StepRecord,
    VersionRecord,
    Winner,
    WorkerSummary,
)
from kagzi.payloads import AesGcm, PayloadCodec  # noqa: E402
from kagzi.registry import step, workflow  # noqa: E402
from kagzi.relations import ChildHandle  # noqa: E402
from kagzi.retry import Retry  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AesGcm",
    "AllStepsFailed",
    "AttemptRecord",
    "BrokenRun",
    "Call",
    "CatchUp",
    "CheckProblem",
    "CheckReport",
    "ChildFailed",
    "ChildHandle",
    "Client",
    "CodecError",
    "Context",
    "DuplicateName",
    "EmbeddedServerFailed",
    "ErrorStrategy",
    "EventTimeout",
    "GroupRecord",
    "GroupTimeout",
    "InvalidArguments",
    "InvalidDefinition",
    "InvalidDsn",
    "InvalidInput",
    "InvalidName",
    "KagziError",
    "LeaseLost",
    "MissingMainGuard",
    "NestingTooDeep",
    "NonDeterminism",
    "OutsideRun",
    "Overlap",
    "ParallelResult",
    "PayloadCodec",
    "PayloadKeyError",
    "PayloadTooLarge",
    "PoolStartFailed",
    "PostgresNotFound",
    "QueueSummary",
    "Retry",
    "RunConflict",
    "RunCrashed",
    "RunDetails",
    "RunEnded",
    "RunFailed",
    "RunHandle",
    "RunStatus",
    "RunSummary",
    "RunWasCancelled",
    "Schedule",
    "SchemaChanged",
    "SchemaMissing",
    "SchemaTooNew",
    "ServerReplaced",
    "ServerTooOld",
    "StaleExtension",
    "StepConflict",
    "StepCrashed",
    "StepFailed",
    "StepFunction",
    "StepFuture",
    "StepInfo",
    "StepRecord",
    "StepTimeout",
    "StoreError",
    "StoreForbidden",
    "StoreUnavailable",
    "UnknownRun",
    "UnknownSchedule",
    "UnknownStep",
    "UnknownWorkflow",
    "VersionRecord",
    "Winner",
    "WorkerSummary",
    "Workflow",
    "__version__",
    "connect",
    "current_step",
    "run",
    "step",
    "workflow",
]
