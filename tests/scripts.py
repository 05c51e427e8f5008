"""Runs a script as a user does: as a process of its own, in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_script(*command: str | Path, dsn: str, cwd: Path | str = "/") -> str:
    """What `python COMMAND...` prints. It must end well, and say nothing on standard error."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    return done.stdout
