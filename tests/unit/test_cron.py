"""When schedules tick: time zones, both changes of the clock; which ticks run of those due."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kagzi.cron import NICKNAMES, Cron, due_ticks
from kagzi.errors import InvalidInput, InvalidName
from kagzi.model import CatchUp, Overlap, Schedule, scheduled_run_id

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


def on_day(expression: str, timezone: str, day: str) -> list[str]:
    """Ticks on a day of that zone, as moments in UTC."""
    zone = ZoneInfo(timezone)
    first = date.fromisoformat(day)
    start, end = (
        datetime.combine(d, datetime.min.time(), zone).astimezone(UTC) for d in (first, first + DAY)
    )
    found = Cron(expression, timezone).ticks(start - SECOND, end - SECOND)
    return [f"{tick:%m-%d %H:%M}" for tick in found]


# --- in a time zone -------------------------------------------------------------------------


def test_ticks_are_by_the_wall_clock_of_the_zone() -> None:
    assert on_day("30 2 * * *", "Europe/Berlin", "2026-01-15") == ["01-15 01:30"]
    assert on_day("30 2 * * *", "Europe/Berlin", "2026-07-15") == ["07-15 00:30"]
    assert on_day("30 2 * * *", "Asia/Kathmandu", "2026-07-15") == ["07-14 20:45"]
    assert on_day("30 2 * * *", "UTC", "2026-07-15") == ["07-15 02:30"]


def test_a_tick_that_the_clock_skips_comes_when_the_skipped_hour_has_passed() -> None:
    assert on_day("30 2 * * *", "Europe/Berlin", "2026-03-29") == ["03-29 01:00"]  # 03:00 there
    assert on_day("30 2 * * *", "America/New_York", "2026-03-08") == ["03-08 07:00"]
    assert on_day("15 2 * * *", "Australia/Lord_Howe", "2026-10-04") == ["10-03 15:30"]
    assert on_day("0 0 * * *", "Africa/Cairo", "2026-04-24") == ["04-23 22:00"]  # 01:00 there


def test_a_tick_that_the_clock_shows_twice_comes_once_at_the_first() -> None:
    assert on_day("30 2 * * *", "Europe/Berlin", "2026-10-25") == ["10-25 00:30"]
    assert on_day("30 1 * * *", "America/New_York", "2026-11-01") == ["11-01 05:30"]
    assert on_day("45 1 * * *", "Australia/Lord_Howe", "2026-04-05") == ["04-04 14:45"]


def test_a_tick_that_was_shown_is_not_shown_again_within_the_repeated_hour() -> None:
    cron = Cron("30 2 * * *", "Europe/Berlin")
    for minute in (0, 10, 29, 30, 31, 59):  # from 02:00 there, for the second time
        found = cron.next_after(moment(f"2026-10-25T01:{minute:02}:00"))
        assert found == moment("2026-10-26T01:30:00")
    assert cron.next_after(moment("2026-10-25T00:30:00")) == moment("2026-10-26T01:30:00")


def test_several_ticks_within_a_skipped_hour_are_one() -> None:
    assert on_day("0,20,40 2 * * *", "Europe/Berlin", "2026-03-29") == ["03-29 01:00"]
    assert on_day("0 2,3 * * *", "Europe/Berlin", "2026-03-29") == ["03-29 01:00"]
    assert on_day("0 0 2 * * *", "Europe/Berlin", "2026-03-29") == ["03-29 01:00"]


def test_hourly_ticks_follow_the_time_that_passes() -> None:
    for expression in ("@hourly", "0 * * * *"):
        assert len(on_day(expression, "Europe/Berlin", "2026-03-29")) == 23
        assert len(on_day(expression, "Europe/Berlin", "2026-10-25")) == 25
    assert len(on_day("*/10 2 * * *", "Europe/Berlin", "2026-03-29")) == 0
    assert len(on_day("*/10 2 * * *", "Europe/Berlin", "2026-10-25")) == 12
    assert on_day("0 */12 * * *", "Europe/Berlin", "2026-10-25") == ["10-24 22:00", "10-25 11:00"]


def test_a_day_that_a_zone_skipped_altogether() -> None:
    assert on_day("0 12 * * *", "Pacific/Apia", "2011-12-29") == ["12-29 22:00"]
    assert on_day("0 12 * * *", "Pacific/Apia", "2011-12-31") == ["12-30 10:00", "12-30 22:00"]


def test_nicknames_are_what_cron_makes_of_them() -> None:
    after = moment("2026-11-23T12:34:56")
    found = {name: Cron(name).next_after(after) for name in NICKNAMES}
    assert found["@hourly"] == moment("2026-11-23T13:00:00")
    assert found["@daily"] == found["@midnight"] == moment("2026-11-24T00:00:00")
    assert found["@weekly"] == moment("2026-11-29T00:00:00")
    assert found["@monthly"] == moment("2026-12-01T00:00:00")
    assert found["@yearly"] == found["@annually"] == moment("2027-01-01T00:00:00")
    assert Cron("@Daily").next_after(after) == found["@daily"]


def test_rare_days_are_found() -> None:
    after = moment("2026-01-01T00:00:00")
    assert Cron("0 0 29 2 *").next_after(after) == moment("2028-02-29T00:00:00")
    assert Cron("0 0 * 2 MON#5").next_after(after) == moment("2044-02-29T00:00:00")
    assert Cron("0 0 L * *").next_after(after) == moment("2026-01-31T00:00:00")
    assert Cron("0 0 29 2 *", "Europe/Berlin").next_after(after) == moment("2028-02-28T23:00:00")


def test_a_moment_between_seconds_is_none_and_a_tick_does_not_follow_itself() -> None:
    cron = Cron("* * * * * *")
    at = moment("2026-01-01T00:00:00")
    assert cron.next_after(at) == at + SECOND
    assert cron.next_after(at + SECOND / 2) == at + SECOND
    assert cron.next_after(at - SECOND / 2) == at


M = timedelta(minutes=1)

# A walk over every minute says what the expression means: slow and plain.

ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Cairo", "Asia/Tehran"]
ZONES += ["America/Sao_Paulo", "Africa/Casablanca", "America/Havana", "Asia/Gaza", "UTC"]
minutes = st.sampled_from(["0", "30", "15,45", "5-7", "*", "*/20"])
hours = st.sampled_from(["0", "1", "2", "3", "23", "0-4", "1,2", "*", "*/2"])
days = st.sampled_from(["*", "*", "*/2"])
starts = st.integers(0, 365 * 30 * 24 * 60).map(
    lambda n: datetime(2005, 1, 1, tzinfo=UTC) + timedelta(minutes=n)
)
changes = st.sampled_from(
    [
        *("2026-03-29T01:00:00", "2026-10-25T01:00:00", "2026-03-08T07:00:00"),
        *("2026-11-01T06:00:00", "2026-10-03T15:30:00", "2026-04-04T15:00:00"),
        *("2026-04-23T22:00:00", "2026-10-29T21:00:00", "2018-11-04T03:00:00"),
        *("2018-02-18T02:00:00", "2026-02-15T02:00:00", "2026-03-22T02:00:00"),
    ]
).flatmap(lambda text: st.sampled_from([moment(text) + n * M for n in (-300, -20, -1, 0, 20, 59)]))


def set_of(field: str, size: int) -> set[int]:
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = ("0", "", str(size - 1)) if span == "*" else span.partition("-")
        found |= set(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


def walked(minute: str, hour: str, zone: ZoneInfo, start: datetime, size: int) -> list[datetime]:
    """Ticks in the minutes after a moment, found by looking at each."""
    wanted = {(h, m) for h in set_of(hour, 24) for m in set_of(minute, 60)}
    by_wall = not minute.startswith("*") and not hour.startswith("*")
    found = []
    for number in range(1, size + 1):
        at = start + timedelta(minutes=number)
        wall = at.astimezone(zone)
        before = (at - timedelta(minutes=1)).astimezone(zone)
        if not by_wall:
            names = [wall.replace(tzinfo=None)]
        else:
            # What the clock shows or has skipped since the last look, if never shown before.
            span = range(
                1, 1 + round((wall.replace(tzinfo=None) - before.replace(tzinfo=None)) / M)
            )
            names = [before.replace(tzinfo=None, fold=0) + n * M for n in span]
            if wall.fold or not span:
                names = []
        if any((name.hour, name.minute) in wanted for name in names):
            found.append(at)
    return found


@settings(max_examples=300)
@given(minutes, hours, st.sampled_from(ZONES), starts | changes)
def test_ticks_are_those_that_a_walk_over_every_minute_finds(
    minute: str, hour: str, timezone: str, start: datetime
) -> None:
    cron = Cron(f"{minute} {hour} * * *", timezone)
    end = start + timedelta(minutes=600)
    assert list(cron.ticks(start, end)) == walked(minute, hour, ZoneInfo(timezone), start, 600)


@settings(max_examples=200)
@given(
    minutes, hours, days, st.sampled_from(ZONES), starts | changes, st.integers(0, 40 * 24 * 3600)
)
def test_last_tick_is_the_last_of_all(
    minute: str, hour: str, day: str, timezone: str, start: datetime, length_s: int
) -> None:
    cron = Cron(f"{minute} {hour} {day} * *", timezone)
    end = start + timedelta(seconds=length_s)
    every = list(cron.ticks(start, min(end, start + 2 * DAY)))
    assert cron.last_tick(start, min(end, start + 2 * DAY)) == (every[-1] if every else None)
    last = cron.last_tick(start, end)
    if last is not None:
        later = cron.next_after(last)
        assert start < last <= end
        assert later is None or later > end


def test_every_second_has_a_last_tick() -> None:
    cron, at = Cron("* * * * * *"), moment("2026-01-01T00:00:00")
    for length in (0, 1, 2, 3, 10, 3600):
        found = cron.last_tick(at, at + length * SECOND)
        assert found == (at + length * SECOND if length else None)


# --- refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        *("* * * *", "* * * * * * *", "61 * * * *", "0 24 * * *", "a b c d e", "*/0 * * * *"),
        *("0 0 0 * *", "0 0 32 * *", "0 0 * 13 *", "0 0 * * FRI-MON", "0 0 * * 1#9", "-1 * * * *"),
        *("0 0 30 2 *", "0 0 31 2,4,6 *", "@reboot", "@", "0 0 L/0 * *", "1-2-3 * * * *"),
        *("٣ * * * *", "0 0 * * ²L", ", * * * *", "0 0 * * L", "0 0 * * 1L-2"),
    ],
)
def test_expression_that_means_nothing_is_refused(expression: str) -> None:
    with pytest.raises(InvalidInput, match="cron expression") as raised:
        Cron(expression)
    assert repr(expression) in str(raised.value)


@pytest.mark.parametrize("expression", ["", " * * * * *", "* *\n* * *", 5, None, "1," * 200 + "1"])
def test_expression_that_is_no_name_is_refused(expression: object) -> None:
    with pytest.raises(InvalidName, match="cron expression"):
        Cron(expression)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "timezone", ["Mars/Base", "../etc/passwd", "America", "", "/etc/localtime", "a\0b", None, 1]
)
def test_zone_that_nobody_knows_is_refused(timezone: object) -> None:
    with pytest.raises(InvalidInput, match=r"time ?zone"):
        Cron("@daily", timezone)  # type: ignore[arg-type]


# --- which ticks run ------------------------------------------------------------------------

NOON = moment("2026-01-01T12:00:00")
EVERY_MINUTE = Cron("* * * * *")


def due(
    cron: Cron,
    since: timedelta,
    catch_up: CatchUp = CatchUp.LAST,
    overlap: Overlap = Overlap.ALLOW,
    most: int = 100,
    late: timedelta = SECOND,
) -> tuple[list[float], float]:
    """Ticks that run, and the next, in minutes from noon; `since` is how long nobody looked."""
    ticks, next_at = due_ticks(cron, NOON - since, NOON + late, catch_up, overlap, most)
    assert next_at is not None
    return [(tick - NOON) / M for tick in ticks], (next_at - NOON) / M


@pytest.mark.parametrize("catch_up", CatchUp)
def test_a_tick_in_time_runs_whatever_the_policy(catch_up: CatchUp) -> None:
    assert due(EVERY_MINUTE, 0 * M, catch_up) == ([0], 1)
    assert due(EVERY_MINUTE, 0 * M, catch_up, late=40 * SECOND) == ([0], 1)
    seconds = due(Cron("*/20 * * * * *"), 1 * M, catch_up, late=0 * M)
    assert seconds[0][-3:] == [-2 / 3, -1 / 3, 0]


def test_catch_up_last_runs_the_newest_of_the_missed_ticks() -> None:
    assert due(Cron("0 * * * *"), 7 * HOUR, late=30 * M) == ([0], 60)
    assert due(Cron("0 0 * * *"), 12 * HOUR) == ([-720], 720)
    assert due(EVERY_MINUTE, 365 * DAY) == ([0], 1)
    assert due(Cron("0 * * * *"), 365 * DAY, late=30 * M) == ([0], 60)


def test_catch_up_none_runs_no_missed_tick() -> None:
    assert due(Cron("0 * * * *"), 7 * HOUR, CatchUp.NONE, late=30 * M) == ([], 60)
    assert due(Cron("0 * * * *"), 7 * HOUR, CatchUp.NONE) == ([0], 60)


def test_catch_up_all_runs_every_missed_tick_some_at_a_time() -> None:
    assert due(Cron("0 * * * *"), 3 * HOUR, CatchUp.ALL, late=30 * M) == ([-180, -120, -60, 0], 60)
    found, next_at = due(EVERY_MINUTE, 365 * DAY, CatchUp.ALL, most=100)
    assert len(found) == 100
    assert found[0] == -365 * 24 * 60
    assert next_at == found[-1] + 1


def test_overlap_skip_lets_only_the_first_of_several_run() -> None:
    one = due(Cron("0 * * * *"), 3 * HOUR, CatchUp.ALL, Overlap.SKIP, late=30 * M)
    assert one == ([-180], 60)


def test_a_tick_that_a_newer_tz_database_no_longer_has_does_not_run() -> None:
    recorded, now = NOON - 30 * M, NOON - 20 * M
    found = due_ticks(Cron("0 * * * *"), recorded, now, CatchUp.LAST, Overlap.ALLOW, 100)
    assert found == ([], NOON)


def test_ids_of_runs_tell_schedule_and_tick_and_differ_in_the_repeated_hour() -> None:
    schedule = Schedule(
        *("nightly", "w", "1", "@daily", "UTC", CatchUp.LAST, Overlap.ALLOW, "default", None),
        *(0, [], False),
        *(None, moment("2026-11-23T02:00:00"), 1, 0, NOON),
    )
    assert schedule.last_run_id == "nightly@2026-11-23T02:00:00Z"
    zone = ZoneInfo("Europe/Berlin")
    twice = [datetime(2026, 10, 25, 2, 30, tzinfo=zone, fold=fold) for fold in (0, 1)]
    assert len({scheduled_run_id("nightly", tick) for tick in twice}) == 2
