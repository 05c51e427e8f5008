import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagzi.errors import InvalidName, NestingTooDeep
from kagzi.model import MAX_NESTING, MAX_STEP_ID_BYTES
from kagzi.scope import Scope, is_below, keyed_ids, member_ids


def test_names_are_numbered_from_their_second_use():
    scope = Scope()
    assert [scope.next_id("fetch") for _ in range(3)] == ["fetch", "fetch#2", "fetch#3"]
    assert scope.next_id("store") == "store"


def test_a_branch_has_numbers_of_its_own():
    root = Scope()
    first, second = (root.branch(lambda: "branch").get() for _ in range(2))
    assert [second.next_id("a"), first.next_id("a"), first.next_id("a")] == [
        "branch#2/a",
        "branch/a",
        "branch/a#2",
    ]


def test_branches_are_numbered_in_the_order_they_were_made_whoever_works_first():
    root = Scope()
    branches = [root.branch(lambda: "b") for _ in range(3)]
    assert [branch.get().path for branch in reversed(branches)] == ["b#3", "b#2", "b"]


def test_a_branch_takes_the_name_it_has_when_something_happens_next():
    root = Scope()
    names = ["early"]
    branch = root.branch(lambda: names[0])
    names[0] = "late"
    assert branch.get().path == "late"


def test_a_branch_and_a_step_of_one_name_do_not_share_an_id():
    root = Scope()
    root.branch(lambda: "fetch")
    assert root.next_id("fetch") == "fetch#2"


def test_an_explicit_id_is_the_same_from_every_branch():
    root = Scope("outer/0")
    branch = root.branch(lambda: "b").get()
    assert branch.explicit_id("home") == root.explicit_id("home") == "outer/0/home"


@pytest.mark.parametrize(
    "name", ["", " a", "a/b", "a#2", "a\x00", "a\nb", "\ud800", "x" * 10_000, None, 7]
)
def test_a_name_that_cannot_be_stored_is_refused_and_shown(name):
    with pytest.raises(InvalidName, match="step id"):
        Scope().explicit_id(name)


def test_groups_too_deep_are_refused():
    Scope(depth=MAX_NESTING - 1).check_depth("g")
    with pytest.raises(NestingTooDeep, match=str(MAX_NESTING)):
        Scope(depth=MAX_NESTING).check_depth("g")


def test_members_are_named_by_place_and_keys_by_themselves():
    assert member_ids("pages", 3) == ["pages/0", "pages/1", "pages/2"]
    assert keyed_ids("pages", ["a", "https://x/y#z"]) == ["pages/a", "pages/https:%2F%2Fx%2Fy%23z"]


@given(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=20))
def test_different_keys_give_different_ids_of_one_level(keys):
    keys = [key for key in keys if not any("\ud800" <= letter <= "\udfff" for letter in key)]
    ids = keyed_ids("g", keys)
    assert len(set(ids)) == len(keys)
    assert all(step_id.count("/") == 1 for step_id in ids)


@pytest.mark.parametrize("keys", [["a", "a"], [""], [1], [None], ["\ud800"], ["é" * 600]])
def test_keys_that_cannot_name_a_step_are_refused(keys):
    with pytest.raises(InvalidName):
        keyed_ids("g", keys)


def test_a_path_too_long_is_refused_with_its_size():
    scope = Scope("b" * (MAX_STEP_ID_BYTES - 3))
    assert scope.next_id("ab")
    with pytest.raises(InvalidName, match="1001 bytes"):
        scope.next_id("abc")


def test_below_means_strictly_inside():
    assert is_below("a/b", "a")
    assert is_below("a", "")
    assert not is_below("ab", "a")
    assert not is_below("a", "a")


def test_scope_knows_which_names_it_has_given() -> None:
    scope = Scope()
    assert not scope.has_given("fetch")
    scope.next_id("fetch")
    assert scope.has_given("fetch")
    assert not scope.has_given("fetch#2")
    scope.next_id("fetch")
    assert scope.has_given("fetch#2")
    scope.explicit_id("home")
    assert scope.has_given("home")
    branch = scope.branch(lambda: "task").get()
    assert scope.has_given("task")
    assert not branch.has_given("fetch")
    assert not branch.has_given("home"), "an explicit id is the run's"
