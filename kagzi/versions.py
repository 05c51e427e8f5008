"""Versions of a workflow side by side: which one a new run gets, and what there is of each."""

from __future__ import annotations

from typing import Any

from kagzi.definition import Workflow
from kagzi.errors import UnknownWorkflow
from kagzi.model import VersionRecord, check_name
from kagzi.registry import registry
from kagzi.store.store import Store


def named_workflow(workflow: Workflow[..., Any] | str, version: str | None) -> Workflow[..., Any]:
    """The registered workflow that is meant, as far as can be told without asking the store.

    Raises:
        UnknownWorkflow: There is none here.
    """
    if isinstance(workflow, Workflow):
        if version is None or version == workflow.version:
            return workflow
        return registry.workflow(workflow.name, version)
    if not isinstance(workflow, str):
        raise UnknownWorkflow(f"{workflow!r} is not a workflow: decorate it with @kagzi.workflow")
    return registry.workflow(workflow, version)


async def default_workflow(store: Store, workflow: Workflow[..., Any]) -> Workflow[..., Any]:
    """The stored default version of a workflow; the one given, if none is stored.

    Raises:
        UnknownWorkflow: The default is a version that is not registered here.
    """
    rows = await store.ask("read_default", workflow=workflow.name)
    if not rows or rows[0][0] == workflow.version:
        return workflow
    (default,) = rows[0]
    if not registry.has(workflow.name, default):
        here = ", ".join(registry.versions(workflow.name))
        raise UnknownWorkflow(
            f"new runs of {workflow.name!r} are of version {default!r}, which is not registered "
            f"here (registered: {here}). Import it, name another with version=, or choose another "
            "default with client.set_default_version"
        )
    return registry.workflow(workflow.name, default)


async def list_versions(
    store: Store, workflow: Workflow[..., Any] | str | None
) -> list[VersionRecord]:
    """What is registered here, has runs, or is a default, by workflow and version.

    Source: sql/versions.sql, list_versions.
    """
    wanted = workflow.name if isinstance(workflow, Workflow) else workflow
    rows = await store.ask("list_versions", workflow=wanted)
    found = {
        (name, version): VersionRecord(
            name, version, is_default, registry.has(name, version), unfinished, finished, latest
        )
        for name, version, is_default, unfinished, finished, latest in rows
    }
    for name, version in registry.names():
        if wanted is None or name == wanted or name.endswith(f".{wanted}"):
            found.setdefault((name, version), VersionRecord(name, version, False, True, 0, 0, None))
    return [found[key] for key in sorted(found)]


async def set_default_version(
    store: Store, workflow: Workflow[..., Any] | str, version: str | None
) -> VersionRecord | None:
    """See `Client.set_default_version`. Committed on return.

    Source: sql/versions.sql, lock_versions, drop_default, put_default.
    """
    if version is not None:
        check_name("version", version)
    known = await list_versions(store, workflow)
    shown = workflow.name if isinstance(workflow, Workflow) else workflow
    names = {record.workflow for record in known}
    if shown in names:
        names = {shown}
    if len(names) != 1:
        reason = "several workflows end in" if names else "nothing is known of a workflow"
        hint = f": {', '.join(sorted(names))}" if names else "; import its module first"
        raise UnknownWorkflow(f"{reason} {shown!r}{hint}")
    (name,) = names
    versions = {record.version: record for record in known if record.workflow == name}
    if version is not None and version not in versions:
        raise UnknownWorkflow(
            f"workflow {name!r} has no version {version!r}: registered here or in the database "
            f"are {', '.join(versions)}. Import the module that has it first"
        )
    async with store.connection() as connection, connection.transaction():
        parameters = {"workflow": name, "version": version, "schema": store.connector.schema}
        statements = ["lock_versions", "drop_default"]
        if version is not None:
            statements.append("put_default")
        for statement in statements:
            await connection.execute(store.queries[statement].encode(), parameters)
    return None if version is None else versions[version]
