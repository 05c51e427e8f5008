"""When a schedule ticks: cron expressions in a time zone; which ticks run of those that have come.

Arithmetic only: the time is an argument. cronsim reads the expression and walks over the wall's
times; here these become moments, which is where summer time comes in. A wall's clock skips an hour
in spring and shows one twice in autumn:

- With times of day (`30 2 * * *`) there is one tick for each that the expression names. One that
  the clock skips comes when the skipped hour has passed; of one that it shows twice the first
  counts.
- With a `*` at the front of the minutes or hours (`0 * * * *`, `*/10 2 * * *`) the clock is taken
  as it goes: a skipped hour has no ticks, one that comes twice has them twice.

Source: cron(8) of Debian, "Daylight Saving Time and other time changes"; crontab(5).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

from cronsim import CronSim

from kagzi.errors import InvalidInput
from kagzi.model import CatchUp, Overlap, check_name

LATE_AFTER = timedelta(seconds=60)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)

NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_SOME_DAY = datetime(2000, 1, 1)


class Cron:
    """A cron expression in a time zone. Ticks are whole seconds, in UTC, ascending.

    Args:
        expression: Five fields (minute, hour, day of month, month, day of week), six with seconds
            in front, or a nickname such as `@hourly`.
        timezone: Of the tz database, such as `Europe/Berlin`.

    Raises:
        InvalidInput: One of them cannot be read.
    """

    def __init__(self, expression: str, timezone: str = "UTC") -> None:
        self.expression = check_name("cron expression", expression, in_path=False)
        self.timezone = timezone
        self._fields = _fields_of(expression)
        self._zone = _zone_of(timezone)
        minute, hour = self._fields.split()[-5:-3]
        self._by_wall = not minute.startswith("*") and not hour.startswith("*")

    def next_after(self, at: datetime) -> datetime | None:
        """The first tick after a moment; None if none comes within some fifty years."""
        at = at.astimezone(UTC).replace(microsecond=0)
        return self._next_by_wall(at) if self._by_wall else self._next_as_it_goes(at)

    def ticks(self, after: datetime, until: datetime) -> Iterator[datetime]:
        """Ticks after one moment, up to and with another."""
        tick = self.next_after(after)
        while tick is not None and tick <= until:
            yield tick
            tick = self.next_after(tick)

    def last_tick(self, after: datetime, until: datetime) -> datetime | None:
        """The last of these. Found by halving: there may be very many."""
        if self._none_between(after, until):
            return None
        start, end = after, until  # what always holds: one lies between them, and none after `end`
        while end - start > SECOND:
            middle = start + (end - start) / 2
            if self._none_between(middle, until):
                end = middle
            else:
                start = middle
        return self.next_after(start)

    def _none_between(self, after: datetime, until: datetime) -> bool:
        tick = self.next_after(after)
        return tick is None or tick > until

    # --- from the wall's time to a moment ---------------------------------------------------

    def _walls_after(self, wall: datetime) -> Iterator[datetime]:
        """What the expression names, as a wall's times without a zone."""
        return CronSim(self._fields, wall)

    def _next_by_wall(self, at: datetime) -> datetime | None:
        for wall in self._walls_after(self._wall_at(at)):
            moment = self._moment_of(wall)
            if moment > at:  # else the clock shows it for the second time
                return moment
        return None

    def _moment_of(self, wall: datetime) -> datetime:
        """When the clock first shows it, or has skipped it."""
        first = wall.replace(tzinfo=self._zone, fold=0).astimezone(UTC)
        if self._wall_at(first) == wall:
            return first
        # It is skipped: read by the offset from before, it lies after the change, and vice versa.
        before = wall.replace(tzinfo=self._zone, fold=1).astimezone(UTC)
        return self._change_between(before, first)

    def _next_as_it_goes(self, at: datetime) -> datetime | None:
        start, wall = at, self._wall_at(at)
        while True:
            found = next(self._walls_after(wall), None)
            if found is None:
                return None
            moment = found - self._offset_at(start)  # if the clock is not changed until then
            moment = moment.replace(tzinfo=UTC)
            change = self._first_change(start, moment)
            if change is None:
                return moment
            start, wall = change, self._wall_at(change) - SECOND  # it may tick with the change

    def _wall_at(self, at: datetime) -> datetime:
        return at.astimezone(self._zone).replace(tzinfo=None)

    def _offset_at(self, at: datetime) -> timedelta:
        offset = at.astimezone(self._zone).utcoffset()
        assert offset is not None, "a zone has an offset at any time"
        return offset

    def _first_change(self, start: datetime, end: datetime) -> datetime | None:
        """The first moment with another offset, after `start`, up to and with `end`."""
        if self._zone is UTC:
            return None
        while start < end:
            later = min(start + DAY, end)
            if self._offset_at(later) != self._offset_at(start):
                return self._change_between(start, later)
            start = later
        return None

    def _change_between(self, before: datetime, after: datetime) -> datetime:
        """The first moment of the later offset."""
        offset = self._offset_at(before)
        while after - before > SECOND:
            middle = (before + (after - before) / 2).replace(microsecond=0)
            if self._offset_at(middle) == offset:
                before = middle
            else:
                after = middle
        return after

    def __repr__(self) -> str:
        return f"<cron {self.expression!r} in {self.timezone}>"


@lru_cache(maxsize=1024)
def cron_of(expression: str, timezone: str) -> Cron:
    """As `Cron`, kept."""
    return Cron(expression, timezone)


def due_ticks(
    cron: Cron, next_at: datetime, now: datetime, catch_up: CatchUp, overlap: Overlap, most: int
) -> tuple[list[datetime], datetime | None]:
    """Of the ticks from `next_at` until `now`, those to run, and the first that is left for later.

    A tick is missed if it comes more than a minute late; those in time all run. Of missed ones run
    all, or the newest if nothing newer runs, or none, as `catch_up` says. Where runs must not
    overlap, only the first of several can run.

    Args:
        most: Of ticks at a time; the others are left for later.
    """
    after, in_time = next_at - SECOND, now - LATE_AFTER
    if catch_up is not CatchUp.ALL:
        after = max(after, in_time)
    ticks: list[datetime] = []
    for tick in cron.ticks(after, now):
        ticks.append(tick)
        if len(ticks) == most:
            break
    if not ticks and catch_up is CatchUp.LAST:
        last = cron.last_tick(next_at - SECOND, now)
        ticks = [last] if last is not None else []
    done_until = ticks[-1] if len(ticks) == most else now
    if overlap is Overlap.SKIP:
        ticks = ticks[:1]
    return ticks, cron.next_after(done_until)


def _fields_of(expression: str) -> str:
    fields = expression
    if expression.startswith("@"):
        if expression.lower() not in NICKNAMES:
            raise InvalidInput(
                f"cron expression {expression!r} is none of {', '.join(sorted(NICKNAMES))}"
            )
        fields = NICKNAMES[expression.lower()]
    try:
        CronSim(fields, _SOME_DAY)
    except Exception as error:  # besides its own error it has those of what it did not expect
        reason = str(error) or type(error).__name__
        raise InvalidInput(
            f"cron expression {expression!r} cannot be read: {reason[:1].lower()}{reason[1:]}. "
            "Write minute, hour, day of month, month and day of week, as in '30 2 * * MON-FRI' "
            "(a sixth field in front is seconds), or a nickname such as @daily"
        ) from None
    return fields


def _zone_of(name: str) -> tzinfo:
    if not isinstance(name, str):
        raise InvalidInput(f"timezone must be a name such as 'Europe/Berlin', got {name!r}")
    if name.upper() in ("UTC", "ETC/UTC"):
        return UTC
    try:
        return ZoneInfo(name)
    except Exception:  # not found, or a name that is no key, or a folder
        raise InvalidInput(
            f"time zone {name!r} is not known here: write a name of the tz database, as in "
            "'Europe/Berlin' or 'UTC'"
        ) from None
