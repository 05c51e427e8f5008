"""Who a worker is: the process it lives in, told apart from any later one with the same pid."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def host_name() -> str:
    """Of this machine, or of the container that passes for one."""
    return socket.gethostname()


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Different after each boot; on a system that has none, when it was booted."""
    path = Path("/proc/sys/kernel/random/boot_id")
    if path.exists():
        namespace = os.readlink("/proc/self/ns/pid") if Path("/proc/self/ns/pid").exists() else ""
        return path.read_text().strip() + namespace
    if sys.platform == "darwin":
        return subprocess.run(
            ["/usr/sbin/sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=True
        ).stdout.strip()
    return "unknown"


def process_start(pid: int) -> str | None:
    """When a process of this machine was started, in a form of its own; None if it is gone.

    Source: proc(5), /proc/pid/stat, field 22; elsewhere ps(1), lstart.
    """
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in ("Z", "X") else fields[19]
    shown = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return shown or None


def is_gone(boot: str, pid: int, started: str) -> bool:
    """Whether a process that was noted on this host is certainly not running any more."""
    if boot != boot_id():
        # Another boot of this machine; or another pid namespace, of which nothing is known here.
        ours, theirs = boot_id().partition("pid:")[0], boot.partition("pid:")[0]
        return ours != theirs
    return process_start(pid) != started
