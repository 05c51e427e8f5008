"""New ids: UUIDs that sort by time."""

from __future__ import annotations

import os
import time
from uuid import UUID


def uuid7() -> UUID:
    """A UUID of milliseconds since 1970 and 74 random bits.

    Source: RFC 9562, section 5.7.
    """
    milliseconds = time.time_ns() // 1_000_000
    random_bits = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds & (1 << 48) - 1) << 80
    value |= 7 << 76 | (random_bits >> 68 & 0xFFF) << 64
    value |= 2 << 62 | random_bits & (1 << 62) - 1
    return UUID(int=value)
