"""Renews a worker's lease from a thread of its own, so that a blocked loop does not lose it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from kagzi import faultpoints
from kagzi.errors import LeaseLost, ServerReplaced
from kagzi.store.connections import Connector
from kagzi.store.history import History
from kagzi.store.queries import load_queries
from kagzi.worker.telling import Telling

logger = logging.getLogger("kagzi.worker")


STOP_S = 5.0


class Heartbeat:
    """The thread.

    Attributes:
        beats: Renewals that succeeded.
        tries: Renewals that were answered, or failed; it stands still while one is unanswered.
        renewed_at: When, by `time.monotonic()`, the last renewal that succeeded was sent.
        is_failing: The last one failed.
        good_since: When, by `time.monotonic()`, the renewals since which none failed began.

    Args:
        on_beat: Told, in the thread, the store's time and when it was asked and answered.
        on_lost: Told, in the thread, that the lease was ended or cannot be trusted any more.
        history: Of the server that the worker's runs are loaded from.
    """

    def __init__(
        self,
        connector: Connector,
        worker_id: UUID,
        lease_s: float,
        heartbeat_s: float,
        on_beat: Callable[[datetime, float, float], None],
        on_lost: Callable[[LeaseLost], None],
        history: History,
    ) -> None:
        self._connector = connector
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._on_beat = on_beat
        self._on_lost = on_lost
        self._history = history
        self._query = load_queries(connector.schema)["renew_lease"].encode()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kagzi-heartbeat", daemon=True)
        self.beats = 0
        self.tries = 0
        self._telling = Telling(logger, "heartbeat failed: %s")
        self.good_since = self.renewed_at = time.monotonic()
        self.is_failing = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(STOP_S)  # it may wait for an answer that never comes

    def _run(self) -> None:
        connection: psycopg.Connection[Any] | None = None
        # Counted from when the last renewal that succeeded was sent: the store's lease is no older.
        self.renewed_at = self.good_since = time.monotonic()
        wait_s = self._heartbeat_s
        try:
            while not self._stop.wait(wait_s):
                wait_s = self._heartbeat_s
                sent = time.monotonic()
                is_new = connection is None
                try:
                    if connection is None:
                        connection = psycopg.connect(
                            self._connector.conninfo(
                                application_name="kagzi-heartbeat",
                                connect_timeout=max(2, int(self._lease_s / 3)),
                            ),
                            **self._connector.options,
                        )
                    if is_new or self._connector.is_pooled:
                        self._history.check_blocking(connection)
                    if faultpoints.reach is not None:
                        faultpoints.reach("heartbeat.before")
                    asked_at = time.time()
                    row = connection.execute(
                        self._query, {"id": self._worker_id, "lease_s": self._lease_s}
                    ).fetchone()
                    answered_at = time.time()
                    if faultpoints.reach is not None:
                        faultpoints.reach("heartbeat.after")
                except psycopg.Error as error:
                    if connection is not None:
                        connection.close()
                        connection = None
                    self.tries += 1
                    self.is_failing = True
                    self._telling.tell(self._connector.explain(error))
                    if not is_new:
                        wait_s = 0.0  # it may be this connection alone, cut while we were paused
                        continue
                    if time.monotonic() - self.renewed_at > self._lease_s:
                        reason = "the lease could not be renewed in time"
                        self._on_lost(LeaseLost(reason, by_store=True))
                        return
                    wait_s = min(1.0, self._heartbeat_s)
                    continue
                except ServerReplaced as error:
                    self._on_lost(error)
                    return
                if row is None:
                    self._on_lost(LeaseLost("another worker ended the lease"))
                    return
                self.renewed_at = sent
                if self.is_failing:
                    self.is_failing, self.good_since = False, time.monotonic()
                    self._telling.clear()
                self.tries += 1
                self.beats += 1
                self._on_beat(row[0], asked_at, answered_at)
        finally:
            if connection is not None:
                connection.close()
