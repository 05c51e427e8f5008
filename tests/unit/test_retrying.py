"""Which checkpoints a retry clears: pure rules over names and call numbers."""

from kagzi.retrying import CallRecord, plan_retry


def call(path, number, failed=False, in_group=False, visible=None):
    return path, CallRecord(path, failed, in_group, number, visible)


def group(path, number, failed=False, visible=None):
    return path, CallRecord(path, failed, False, number, visible)


def test_only_the_failures_that_caused_the_error_are_cleared():
    steps = dict(
        [
            call("a", 1),
            call("b", 2, failed=True, visible=2),
            call("handled", 1, failed=True, visible=1),
        ]
    )
    assert plan_retry(steps, {}, ["b"], []) == ({"b"}, set())


def test_failures_that_nobody_handled_are_cleared_too():
    steps = dict(
        [
            call("cause", 1, failed=True, visible=5),
            call("seen at once with it", 2, failed=True, visible=5),
            call("never seen", 3, failed=True),
            call("g/0", 3, failed=True, in_group=True, visible=6),
            call("outer/never seen", 3, failed=True),
            call("branch#2/seen later", 3, failed=True, visible=6),
            call("seen before", 1, failed=True, visible=4),
        ]
    )
    cleared = plan_retry(steps, dict([group("g", 3)]), ["cause"], [])
    assert cleared == (steps.keys() - {"seen before"}, {"g"})


def test_a_failure_that_another_branch_saw_is_left_to_it():
    steps = dict(
        [
            call("left/a", 1, failed=True, visible=2),
            call("right/b", 1, failed=True, visible=3),
            call("right/instead", 4),
        ]
    )
    assert plan_retry(steps, {}, ["left/a"], [])[0] == {"left/a"}


def test_a_group_with_a_cleared_member_loses_its_decision_and_keeps_its_results():
    steps = dict(
        [
            call("pages/0", 1, in_group=True),
            call("pages/1", 1, failed=True, in_group=True, visible=1),
        ]
    )
    assert plan_retry(steps, dict([group("pages", 1, failed=True)]), ["pages/1"], []) == (
        {"pages/1"},
        {"pages"},
    )


def test_steps_called_after_the_failure_was_seen_run_again():
    steps = dict([call("a", 1, failed=True, visible=3), call("before", 3), call("cleanup", 4)])
    assert plan_retry(steps, {}, ["a"], [])[0] == {"a", "cleanup"}


def test_another_branch_keeps_what_it_did_after_the_failure():
    steps = dict(
        [
            call("left/a", 1, failed=True, visible=2),
            call("left/after", 3),
            call("right/after", 4),
            call("end", 5),
        ]
    )
    assert plan_retry(steps, {}, ["left/a"], [])[0] == {"left/a", "left/after", "end"}


def test_the_outer_steps_of_a_cleared_inner_one_run_again():
    steps = dict(
        [
            call("outer/0", 1, failed=True, in_group=True, visible=9),
            call("outer/0/inner/0", 2, in_group=True),
            call("outer/0/inner/1", 2, failed=True, in_group=True, visible=5),
        ]
    )
    groups = dict([group("outer", 1), group("outer/0/inner", 2)])
    cleared = plan_retry(steps, groups, ["outer/0/inner/1"], [])
    assert cleared == ({"outer/0", "outer/0/inner/1"}, {"outer", "outer/0/inner"})


def test_a_group_that_ran_out_of_time_is_opened_again():
    groups = dict([group("slow", 1, failed=True, visible=2), group("later", 3)])
    steps = dict([call("slow/0", 1, in_group=True), call("later/0", 3, in_group=True)])
    assert plan_retry(steps, groups, [], ["slow"]) == ({"later/0"}, {"slow", "later"})


def test_a_cause_without_a_checkpoint_clears_nothing():
    assert plan_retry({}, {}, ["gone"], ["gone"]) == (set(), set())
