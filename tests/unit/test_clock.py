from datetime import UTC, datetime, timedelta

from kagzi.engine.clock import StoreClock


def at(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def test_clocks_that_agree_within_the_way_of_the_message_are_one_clock():
    clock = StoreClock()
    clock.set(at(1000.004), 1000.0, 1000.005)
    assert clock.offset_s == 0.0


def test_a_store_that_is_ahead_is_believed_to_within_half_of_the_way():
    clock = StoreClock()
    clock.set(at(1060.0), 1000.0, 1000.5)
    assert clock.offset_s == 59.75
    clock.set(at(1070.0), 1010.2, 1010.4)
    assert clock.offset_s == 59.75, "still possible, so it is kept"
    clock.set(at(1080.0), 1020.0, 1020.1)
    assert clock.offset_s == 59.95


def test_seconds_until_a_moment_count_by_the_store():
    clock = StoreClock()
    clock.set(at(4600.0), 1000.0, 1000.0)
    before = clock.now()
    left = timedelta(seconds=clock.seconds_until(before + timedelta(seconds=5)))
    passed = clock.now() - before
    assert timedelta(seconds=5) - passed <= left <= timedelta(seconds=5)
