"""What step bodies leave behind for a test to see, and what they wait for, as files in one folder.

Works between any processes: each entry is one atomic append, each gate one file.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from pathlib import Path

PATIENCE_S = 60.0


class Witness:
    """One folder of entries and gates."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)

    # --- a body's side ----------------------------------------------------------------------

    def note(self, entry: str) -> None:
        """Append one line."""
        descriptor = os.open(f"{self.folder}/entries", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, f"{entry}\n".encode())
        finally:
            os.close(descriptor)

    async def pass_gate(self, name: str) -> None:
        """Wait until the gate is open."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_open(name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"gate {name} stayed shut")
            await asyncio.sleep(0.002)

    def block_at_gate(self, name: str) -> None:
        """The same, blocking the thread."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_open(name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"gate {name} stayed shut")
            time.sleep(0.002)

    # --- a test's side ----------------------------------------------------------------------

    def open(self, *names: str) -> None:
        """Open gates, for everybody and for good."""
        for name in names:
            Path(self.folder, f"gate-{name}").touch()

    def shut(self, name: str) -> None:
        Path(self.folder, f"gate-{name}").unlink(missing_ok=True)

    def is_open(self, name: str) -> bool:
        return os.path.exists(f"{self.folder}/gate-{name}")

    @property
    def entries(self) -> list[str]:
        """Every line so far, in order."""
        try:
            return Path(self.folder, "entries").read_text().splitlines()
        except FileNotFoundError:
            return []

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.entries)

    def most_open(self, begin: str = "+", end: str = "-") -> int:
        """The most bodies that were open at once, each having noted `begin` and `end` marks."""
        most = now = 0
        for entry in self.entries:
            now += entry.startswith(begin) - entry.startswith(end)
            most = max(most, now)
        return most
