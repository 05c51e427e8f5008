"""Frames of `_core` against their twins."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagzi import _core as core
from tests import reference

INT64 = st.integers(-(2**63), 2**63 - 1)
UINT64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MESSAGES = st.lists(
    st.tuples(
        st.integers(0, 255), UINT64, INT64, INT64, st.binary(max_size=9), st.binary(max_size=40)
    ),
    max_size=8,
)


def pack(messages, module=core):
    writer = module.FrameWriter()
    for message in messages:
        writer.add(*message)
    return writer.take()


def cut(data, places):
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in pairwise(edges)]


def feed_all(reader, pieces):
    """What comes out piece by piece, up to the first error."""
    answers = []
    for piece in pieces:
        try:
            answers.append((reader.feed(piece), reader.pending_bytes))
        except ValueError:
            return [*answers, ValueError]
    return answers


@given(MESSAGES)
def test_writer_packs_what_its_twin_packs(messages):
    assert pack(messages) == pack(messages, reference)


@given(MESSAGES)
def test_a_body_that_goes_its_own_way_follows_its_head(messages):
    data, ours, twins = b"", core.FrameWriter(), reference.FrameWriter()
    for *fields, head, body in messages:
        ours.add_head(*fields, head, len(body))
        twins.add_head(*fields, head, len(body))
        packed = ours.take()
        assert packed == twins.take()
        data += packed + body
    assert data == pack(messages)


def test_a_body_of_no_size_is_refused():
    with pytest.raises(ValueError, match="cannot follow"):
        core.FrameWriter().add_head(1, 1, 0, 0, b"", -1)
    with pytest.raises(ValueError, match="at most"):
        core.FrameWriter().add_head(1, 1, 0, 0, b"", 2**31)


@given(MESSAGES, st.lists(st.integers(0), max_size=12))
def test_messages_come_back_whole_whatever_the_pieces(messages, places):
    reader, twin = core.FrameReader(), reference.FrameReader()
    pieces = cut(pack(messages), places)
    answers = feed_all(reader, pieces)
    assert answers == feed_all(twin, pieces)
    assert [message for answer, _ in answers for message in answer] == messages
    assert reader.pending_bytes == 0


@given(MESSAGES)
def test_messages_come_back_whole_byte_by_byte(messages):
    reader = core.FrameReader()
    data = pack(messages)
    came = [message for byte in data for message in reader.feed(bytes([byte]))]
    assert came == messages


@given(
    MESSAGES,
    st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=3),
    st.lists(st.integers(0), max_size=5),
    st.integers(29, 90),
)
def test_spoilt_bytes_give_what_the_twin_gives(messages, spoilt, places, most_bytes):
    data = bytearray(pack(messages))
    for place, byte in spoilt:
        if data:
            data[place % len(data)] = byte
    pieces = cut(bytes(data), places)
    reader, twin = core.FrameReader(most_bytes), reference.FrameReader(most_bytes)
    assert feed_all(reader, pieces) == feed_all(twin, pieces)


@given(st.binary(max_size=200))
def test_any_bytes_give_what_the_twin_gives(data):
    assert feed_all(core.FrameReader(), [data]) == feed_all(reference.FrameReader(), [data])


def make_step(module, step_id="pages/0", data=b"[1]", run_id=b"r" * 16):
    return module.Step(None, run_id, step_id, None, "app:fetch", data, b"h" * 16)


@given(
    kind=st.integers(0, 255),
    step_id=TEXT,
    data=st.binary(max_size=50),
    function_number=INT64,
    attempt=st.integers(0, 2**16 - 1),
    timeout_us=st.integers(0, 2**47 - 1),
)
def test_step_is_packed_as_its_twin(kind, step_id, data, function_number, attempt, timeout_us):
    frames = []
    for module in (core, reference):
        step = make_step(module, step_id, data)
        module.Scheduler().add(step)
        step.attempt = attempt
        step.timeout_us = timeout_us
        writer = module.FrameWriter()
        writer.add_step(kind, step, function_number)
        assert len(writer) == 4 + 29 + 16 + len(step_id.encode()) + len(data)
        frames.append(writer.take())
        assert len(writer) == 0
    assert frames[0] == frames[1]
    [message] = core.FrameReader().feed(frames[0])
    second = attempt | timeout_us << 16
    assert message == (kind, 1, function_number, second, b"r" * 16 + step_id.encode(), data)


def test_large_body_comes_back_from_small_pieces():
    body = bytes(range(256)) * 8192
    data = pack([(1, 2, 3, 4, b"head", body)] * 2)
    reader = core.FrameReader()
    pieces = [data[start : start + 70_001] for start in range(0, len(data), 70_001)]
    came = [message for piece in pieces for message in reader.feed(piece)]
    assert came == [(1, 2, 3, 4, b"head", body)] * 2


def test_length_that_is_too_long_is_refused_before_it_has_come():
    reader = core.FrameReader(most_bytes=100)
    assert reader.feed(b"\x65\0\0") == []
    with pytest.raises(ValueError, match="101 bytes"):
        reader.feed(b"\0")


@pytest.mark.parametrize("length", [0, 1, 28, 2**31, 2**32 - 1])
def test_length_that_no_writer_makes_is_refused(length):
    with pytest.raises(ValueError, match="not from a frame writer"):
        core.FrameReader().feed(struct.pack("<I", length))


@pytest.mark.parametrize("head", [1, 2**31, 2**32 - 1])
def test_head_longer_than_its_message_is_refused(head):
    message = struct.pack("<IBQqqI", 29, 1, 0, 0, 0, head)
    with pytest.raises(ValueError, match="head"):
        core.FrameReader().feed(message)


def test_reader_stays_refused_after_an_error():
    reader = core.FrameReader()
    with pytest.raises(ValueError, match="not from a frame writer"):
        reader.feed(bytes(4))
    with pytest.raises(ValueError, match="not from a frame writer"):
        reader.feed(pack([(1, 0, 0, 0, b"", b"")]))


@pytest.mark.parametrize("most_bytes", [28, -1, 2**32])
def test_reader_refuses_a_limit_that_no_length_can_say(most_bytes):
    with pytest.raises(ValueError, match="29 to"):
        core.FrameReader(most_bytes)


@pytest.mark.parametrize("kind", [-1, 256])
def test_kind_that_is_no_byte_is_refused(kind):
    writer = core.FrameWriter()
    with pytest.raises(ValueError, match="kind"):
        writer.add(kind, 0)
    with pytest.raises(ValueError, match="kind"):
        writer.add_step(kind, make_step(core), 0)
    assert len(writer) == 0


@pytest.mark.parametrize("number", [-1, 2**64])
def test_number_that_its_field_cannot_hold_is_refused(number):
    with pytest.raises(OverflowError):
        core.FrameWriter().add(1, number)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempt", -1),
        ("attempt", 2**16),
        ("timeout_us", -1),
        ("timeout_us", 2**47),
        ("run_id", b"short"),
        ("run_id", None),
        ("id", None),
        ("id", "\ud800"),
        ("input", None),
    ],
)
def test_step_that_a_frame_cannot_carry_is_refused(field, value):
    writer, step = core.FrameWriter(), make_step(core)
    setattr(step, field, value)
    with pytest.raises(ValueError, match=r"."):
        writer.add_step(1, step, 0)
    assert len(writer) == 0
