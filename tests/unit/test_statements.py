from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq
from psycopg.adapt import Transformer

from kagzi.store.statements import BYTES, FLOATS, INTS, TEXTS, TIMES, UUIDS, binary_array

ELEMENTS = {
    UUIDS: st.uuids(),
    TEXTS: st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    INTS: st.integers(-(2**31), 2**31 - 1),
    FLOATS: st.floats(),
    BYTES: st.binary(max_size=20),
    TIMES: st.datetimes(
        datetime(1900, 1, 1), datetime(9000, 1, 1), timezones=st.just(timezone(timedelta(hours=2)))
    ),
}


@pytest.mark.parametrize("oid", ELEMENTS)
@given(data=st.data())
def test_a_binary_array_is_read_back_as_it_was(oid, data):
    values = data.draw(st.lists(st.none() | ELEMENTS[oid], max_size=5))
    loader = Transformer().get_loader(oid, pq.Format.BINARY)
    back = loader.load(binary_array(oid, values))
    if oid == FLOATS:
        assert [repr(value) for value in back] == [repr(value) for value in values]
    else:
        assert back == values


def test_a_moment_without_a_zone_is_refused():
    with pytest.raises(TypeError):
        binary_array(TIMES, [datetime(2026, 1, 1)])
    assert binary_array(TIMES, [datetime(2026, 1, 1, tzinfo=UTC)])
    assert binary_array(UUIDS, [UUID(int=1)])
