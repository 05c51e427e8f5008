"""The ids of a fixed set of programs: the same on every Python and loop, live and on replay."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
import uvloop

from tests.engine import id_programs
from tests.engine.witness import Witness
from tests.fix_engine import started

GOLDEN = Path(__file__).parents[1] / "histories" / "step_ids.json"

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.mark.parametrize("loop", LOOPS)
def test_golden_ids_are_the_same_on_every_python_and_loop(
    dsn: str, witness: Witness, loop: str
) -> None:
    """After a change that is meant: run with KAGZI_WRITE_GOLDEN=1 and look at the difference."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        ids = runner.run(_all_ids(dsn, witness))
    if os.environ.get("KAGZI_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(ids, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert ids == json.loads(GOLDEN.read_text())


async def _all_ids(dsn: str, witness: Witness) -> dict[str, dict[str, str]]:
    found = {}
    async with started(dsn) as engine:
        for name, program in id_programs.PROGRAMS.items():
            _, handle = await engine.drive(program, witness.folder)
            rows = await engine.rows(
                "SELECT step_id, function, parent_step_id FROM kagzi.step_runs"
                " WHERE run_id = %(id)s ORDER BY step_id",
                id=handle.run_id,
            )
            found[name] = {
                step_id: function if parent is None else f"{function} in {parent}"
                for step_id, function, parent in rows
            }
            entries = len(witness.entries)
            assert await engine.replay(handle) is None, name
            assert await engine.count("step_runs", handle.run_id) == len(rows), name
            assert len(witness.entries) == entries, "a replay finds every step under its id"
    return found
