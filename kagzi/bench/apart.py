"""A client and a worker in a process of their own: `python -m kagzi.bench.apart`, as a helper."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from typing import Any

import uvloop

MODULE = "kagzi.bench.apart"
WINDOW = 1000


def main() -> None:
    # Pool processes import this file again, and have no use for these.
    from kagzi.bench import work
    from kagzi.bench.counters import reset_peak, resident_mib
    from kagzi.bench.floor import PlainScript
    from kagzi.bench.helper import keep_answers_apart, serve, settings
    from kagzi.bench.many import all_at_once, one_by_one
    from kagzi.bench.session import Bench, Session

    async def apart() -> None:
        given = settings()
        bench = Bench(given["conninfo"], given["processes"], schema=given["schema"])
        async with bench.session(poll_s=1.0, warm=(10,)) as session:
            await serve(
                {
                    "pids": lambda: _value(session.pool_processes()),
                    "memory": lambda size: memory_of(session, run_of(session, work.nothings, size)),
                    "streamed": lambda n: memory_of(session, run_of(session, work.streamed, n)),
                    "pages_listed": lambda n: memory_of(
                        session, run_of(session, work.pages_listed, n)
                    ),
                    "pages_completed": lambda n: memory_of(
                        session, run_of(session, work.pages_completed, n)
                    ),
                    "pages_streamed": lambda n: memory_of(
                        session, run_of(session, work.pages_streamed, n)
                    ),
                    "resume": session.resume,
                    "floor": lambda size: memory_of(session, floor_of(bench, size, size)),
                    "floor_streamed": lambda size: memory_of(
                        session, floor_of(bench, size, WINDOW)
                    ),
                    "group": lambda size: session.run(work.nothings, size),
                    "pauses": lambda size, seconds: session.run(work.together, size, seconds),
                    "sequence": lambda size: session.run(work.nothings_in_sequence, size),
                    "replay": lambda size: replay(session, size),
                    "race": lambda *args: session.run(work.raced, *args),
                    "latency": lambda count: one_by_one(session.client, count),
                    "runs": lambda count, steps: all_at_once(session.client, count, steps),
                    "cpu": lambda size, cpu_s: session.run(work.computed, size, cpu_s),
                }
            )

    def run_of(session: Session, workflow: Any, *args: Any) -> Callable[[], Any]:
        return lambda: session.run(workflow, *args)

    def floor_of(bench: Bench, size: int, at_once: int) -> Callable[[], Any]:
        async def floor() -> float:
            with closing(PlainScript(bench.conninfo, bench.schema)) as plain:
                return sum([await plain.group(at_once) for _ in range(size // at_once)])

        return floor

    async def replay(session: Session, size: int) -> float:
        return (await session.drive_again(1, size, 0.0, True))[1]

    async def memory_of(session: Session, run: Callable[[], Any]) -> dict[str, float | None]:
        """Seconds, and MiB over what the processes had before."""
        pids = [os.getpid(), *session.pool_processes()]
        before = [resident_mib(pid) for pid in pids]
        for pid in pids:
            reset_peak(pid)
        seconds = await run()
        grown = [
            None if start is None else (resident_mib(pid, peak=True) or start) - start
            for pid, start in zip(pids, before, strict=True)
        ]
        own, *pool = grown
        return {
            "seconds": seconds,
            "coordinator_mib": own,
            "pool_mib": sum(mib for mib in pool if mib is not None),
        }

    keep_answers_apart()
    uvloop.run(apart())


async def _value(value: Any) -> Any:
    return value


if __name__ == "__main__":
    main()
