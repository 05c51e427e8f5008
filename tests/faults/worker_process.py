"""A worker as a program of its own: `python -m tests.faults.worker_process DSN OPTIONS`."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import kagzi
from tests.faults import programs


async def main(dsn: str, options: str) -> None:
    assert programs, "imported for the workflows that it registers"
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    async with kagzi.connect(dsn, migrate=False) as client:
        async with client.worker(**json.loads(options)):
            print("claims", flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
