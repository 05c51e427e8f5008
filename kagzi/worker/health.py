"""Tells over HTTP how a worker is: `/healthz` gives 200 or 503, and the reasons as JSON."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson

from kagzi.errors import InvalidInput
from kagzi.worker.worker import Worker

PATH = "/healthz"
REQUEST_BYTES = 8192
REQUEST_S = 5.0
SAMPLE_S = 0.5
SAMPLES = 20


def check_port(health_port: int | None) -> int | None:
    """A port that can be listened on; None: there is no endpoint. Raises `InvalidInput`."""
    if health_port is None or (type(health_port) is int and 0 <= health_port <= 65535):
        return health_port
    raise InvalidInput(
        f"health_port must be a port from 0 (any free one) to 65535, got {health_port!r}"
    )


def health_of(worker: Worker, lag_s: float) -> dict[str, Any]:
    """How an incarnation is, and whether that is well."""
    heartbeat = worker.heartbeat
    lease_age_s = time.monotonic() - heartbeat.renewed_at
    processes = 0 if worker.pool is None else len(worker.pool.process_ids)
    reasons = []
    if worker.lost is not None:
        reasons.append(f"it has lost its lease: {worker.lost}")
    if lease_age_s > worker.lease_s:
        reasons.append(f"its lease was not renewed for {lease_age_s:.1f} s")
    if heartbeat.is_failing:
        reasons.append("the store cannot be reached, or refuses")
    if worker.processes and not processes:
        reasons.append("no pool process is alive")
    status = "lost" if worker.lost is not None else "draining" if worker.is_draining else "active"
    return {
        "healthy": not reasons,
        "reasons": reasons,
        "worker_id": str(worker.worker_id),
        "status": status,
        "lease_age_s": round(lease_age_s, 3),
        "lease_s": worker.lease_s,
        "store_reachable": not heartbeat.is_failing,
        "runs": len(worker.runs),
        "concurrency": worker.concurrency,
        "pool_processes": processes,
        "processes": worker.processes,
        "loop_lag_s": round(lag_s, 4),
    }


class Health:
    """The endpoint.

    Attributes:
        port: Where it listens; chosen by the system if 0 was asked for.

    Args:
        worker: The present incarnation.
    """

    def __init__(self, worker: Callable[[], Worker], host: str, port: int) -> None:
        self._worker = worker
        self._host = host
        self.port = port
        self._lags: deque[float] = deque([0.0], maxlen=SAMPLES)
        self._server: asyncio.Server | None = None
        self._sampling: asyncio.Task[None] | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen.

        Raises:
            InvalidInput: The address cannot be listened on.
        """
        try:
            self._server = await asyncio.start_server(self._accept, self._host, self.port)
        except OSError as error:
            raise InvalidInput(
                f"health endpoint: {self._host}:{self.port} cannot be listened on: {error}; "
                "choose another health_port (0: any free one)"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]
        self._sampling = asyncio.get_running_loop().create_task(self._sample())

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = [*self._answering, *([] if self._sampling is None else [self._sampling])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def state(self) -> dict[str, Any]:
        """What the endpoint tells at this moment."""
        return health_of(self._worker(), max(self._lags))

    async def _sample(self) -> None:
        """How late the loop is, at its worst of the last seconds."""
        while True:
            began_at = time.monotonic()
            await asyncio.sleep(SAMPLE_S)
            self._lags.append(max(0.0, time.monotonic() - began_at - SAMPLE_S))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._answer(reader, writer))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
                async with asyncio.timeout(REQUEST_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._response(head[:REQUEST_BYTES]))
                    await writer.drain()
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _response(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0].decode("latin-1")
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", {"error": "only GET and HEAD"}
        elif path != PATH:
            status, body = "404 Not Found", {"error": f"only {PATH}"}
        else:
            body = self.state()
            status = "200 OK" if body["healthy"] else "503 Service Unavailable"
        data = orjson.dumps(body) + b"\n"
        lines = (
            f"HTTP/1.1 {status}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Cache-Control: no-store",
            "Connection: close",
        )
        sent = "\r\n".join(lines).encode() + b"\r\n\r\n"
        return sent if method == b"HEAD" else sent + data
