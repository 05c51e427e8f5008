"""Seals what goes to the database as bytes, and opens what comes from it.

On kagzi's own connections every `bytes` parameter and every bytea column is a payload (or as good
as one: an input hash), so this is a matter of the connection: statements need not know. Where rows
are built by hand (the checkpoint writer, COPY) it is said there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg.abc import AdaptContext, Buffer
from psycopg.types.string import (
    ByteaBinaryLoader,
    ByteaLoader,
    BytesBinaryDumper,
    BytesDumper,
)

from kagzi._core import Step
from kagzi.payloads import Sealer


def register(context: AdaptContext, sealer: Sealer) -> None:
    """Seal and open on this connection or cursor."""

    class Dumper(BytesDumper):
        def dump(self, obj: Any) -> Buffer | None:
            return super().dump(sealer.seal(bytes(obj)))

    class BinaryDumper(BytesBinaryDumper):
        def dump(self, obj: Any) -> Buffer | None:
            return sealer.seal(bytes(obj))

    class Loader(ByteaLoader):
        def load(self, data: Buffer) -> bytes:
            return sealer.unseal(super().load(bytes(data)))

    class BinaryLoader(ByteaBinaryLoader):
        def load(self, data: Buffer) -> bytes:
            return sealer.unseal(bytes(super().load(data)))

    context.adapters.register_dumper(bytes, Dumper)
    context.adapters.register_dumper(bytes, BinaryDumper)
    context.adapters.register_loader("bytea", Loader)
    context.adapters.register_loader("bytea", BinaryLoader)


def sealed_steps(steps: Sequence[Step], sealer: Sealer) -> list[Step]:
    """Steps whose rows may be written. The ones given stay as they are."""
    return [_sealed(step, sealer.seal) for step in steps]


def _sealed(step: Step, seal: Any) -> Step:
    sealed = Step(
        None,
        step.run_id,
        step.id,
        None,
        step.function,
        seal(step.input),
        seal(step.input_hash),  # a hash gives away what can be guessed
    )
    sealed.status = step.status
    sealed.output = None if step.output is None else seal(step.output)
    sealed.error = None if step.error is None else seal(step.error)
    sealed.attempt = step.attempt
    sealed.group_id = step.group_id
    sealed.parent_id = step.parent_id
    sealed.started_us = step.started_us
    sealed.completed_us = step.completed_us
    sealed.call_number = step.call_number
    sealed.completed_number = step.completed_number
    sealed.worker_id = step.worker_id
    sealed.process_id = step.process_id
    return sealed
