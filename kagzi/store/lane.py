"""One connection for short statements that are asked all the time: claims, ends, notifications.

The others go through the connection pool, and so do these while it is in use.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import psycopg

from kagzi.store.connections import Connector
from kagzi.store.direct import DirectConnection
from kagzi.store.statements import (
    BOOL_OID,
    INT_OID,
    TEXT_OID,
    TEXTS,
    UUID_OID,
    UUIDS,
    Statement,
    typed_rows,
)

logger = logging.getLogger("kagzi.store")

_TYPES: dict[str, dict[str, int]] = {
    "claim_runs": {
        "worker_id": UUID_OID,
        "names": TEXTS,
        "versions": TEXTS,
        "most": INT_OID,
        "suspects": INT_OID,
        "served": TEXTS,
        "takes_default": BOOL_OID,
    },
    "read_ends": {"ids": UUIDS, "everyone": BOOL_OID},
    "read_news": {"worker_id": UUID_OID},
    "find_untold": {},
    "notify": {"channel": TEXT_OID},
}


def lane_statements(queries: dict[str, str]) -> dict[str, Statement]:
    """By name."""
    return {name: Statement(name, queries[name], oids) for name, oids in _TYPES.items()}


class Lane:
    """Of one store."""

    def __init__(self, connector: Connector, queries: dict[str, str]) -> None:
        self._connector = connector
        self._direct = DirectConnection(connector, "kagzi-lane")
        self._statements = lane_statements(queries)

    async def rows(self, name: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]] | None:
        """As `Store.rows`; None: this is to be asked elsewhere, nothing was sent."""
        statement = self._statements.get(name)
        if statement is None or not self._direct.is_free:
            return None
        try:
            await self._direct.open()
        except psycopg.Error as error:
            logger.debug("no connection for short statements: %s", self._connector.explain(error))
            return None
        sealer = self._connector.sealer
        result = await self._direct.ask(statement, parameters)
        return typed_rows(result, None if sealer is None else sealer.unseal)

    async def close(self) -> None:
        await self._direct.close()
