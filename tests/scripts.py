"""Runs a script as a user does: as a process of its own, in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A whole record, with the stack that it shows.
BLOCKED = re.compile(r".*event loop of this worker has been blocked.*\n(?: .*\n)*\n?")


def run_script(*command: str | Path, dsn: str, cwd: Path | str = "/") -> str:
    """What `python COMMAND...` prints. It must end well, and say nothing on standard error.

    But for what a worker says where the machine stands still for a moment.
    """
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    said = BLOCKED.sub("", done.stderr)
    assert said == "", said
    return done.stdout
