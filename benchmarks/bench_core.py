"""What each hot function of `kagzi._core` costs: no database, no sockets, no loop.

Each `time_` body handles STEPS steps; the `track_` twins say the same in nanoseconds per step.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from kagzi import _core as core

STEPS = 1000
BATCH = 256
DONE = 2
RUN_ID = b"r" * 16
INPUT = b'["https://example.org/page"]'
INPUT_HASH = core.hash_input("app:fetch", INPUT)
ANSWER = b'{"status": 200}'


def make_steps(gate: core.Gate | None = None, function_gate: core.Gate | None = None) -> list[Any]:
    return [
        core.Step(
            None,
            RUN_ID,
            f"pages/{index}",
            None,
            "app:fetch",
            INPUT,
            INPUT_HASH,
            gate=gate,
            function_gate=function_gate,
            index=index,
        )
        for index in range(STEPS)
    ]


def make_begun() -> tuple[core.Scheduler, core.Place, list[core.Step]]:
    scheduler, place = core.Scheduler(), core.Place([STEPS, 0, 0])
    scheduler.add_all(make_steps())
    return scheduler, place, scheduler.take(place, STEPS)


def make_ended() -> list[Any]:
    steps = make_steps()
    for step in steps:
        step.status = "completed"
        step.output = ANSWER
        step.started_us = 1_700_000_000_000_000
        step.completed_us = step.started_us + 15
        step.worker_id = step.group_id = b"w" * 16
    return steps


class Construction:
    def setup(self) -> None:
        self.kept: list[Any] = []

    def time_steps(self) -> None:
        self.kept = make_steps()

    def time_input_hashes(self) -> None:
        for _ in range(STEPS):
            core.hash_input("app:fetch", INPUT)


class Scheduling:
    """One pass each: a scheduler is used up, so every sample gets a new one."""

    number = 1
    warmup_time = 0

    def setup(self) -> None:
        self.scheduler, self.place = core.Scheduler(), core.Place([STEPS, 0, 0])
        self.narrow = core.Place([40, 0, 0])
        self.fresh = make_steps()
        self.limited = make_steps(gate=core.Gate(32))
        self.function_limited = make_steps(function_gate=core.Gate(32))
        self.added = core.Scheduler()
        self.to_take = make_steps()
        self.added.add_all(self.to_take)
        self.begun, self.home, self.running = make_begun()
        self.answers = [
            (DONE, step.number, 1_700_000_000_000_000, 15, b"", ANSWER) for step in self.running
        ]

    def time_add_all(self) -> None:
        self.scheduler.add_all(self.fresh)

    def time_take(self) -> None:
        while self.added.take(self.place, BATCH):
            pass

    def time_absorb(self) -> None:
        self.begun.absorb(self.answers, DONE, 1)

    def time_drop(self) -> None:
        for step in self.to_take:
            self.added.drop(step)

    def time_suspend_and_resume(self) -> None:
        for step in self.running:
            self.begun.suspend(step)
        for step in self.running:
            self.begun.resume(step)
        self.begun.take(self.home, 0)

    def pass_through(self, steps: list[Any]) -> None:
        self.scheduler.add_all(steps)
        while taken := self.scheduler.take(self.narrow, BATCH):
            for step in taken:
                self.scheduler.finish(step)

    def time_pass_through(self) -> None:
        self.pass_through(self.fresh)

    def time_pass_through_a_group_limit(self) -> None:
        self.pass_through(self.limited)

    def time_pass_through_a_function_limit(self) -> None:
        self.pass_through(self.function_limited)


class Frames:
    def setup(self) -> None:
        _, _, self.steps = make_begun()
        self.writer = core.FrameWriter()
        self.reader = core.FrameReader()
        for number in range(STEPS):
            self.writer.add(DONE, number, 1_700_000_000_000_000, 15, b"", ANSWER)
        data = self.writer.take()
        self.pieces = [data[start : start + 16_384] for start in range(0, len(data), 16_384)]

    def time_add_step(self) -> None:
        for step in self.steps:
            self.writer.add_step(1, step, 3)
        self.writer.take()

    def time_feed(self) -> None:
        for piece in self.pieces:
            self.reader.feed(piece)


class Results:
    number = 1
    warmup_time = 0

    def setup(self) -> None:
        self.steps = make_ended()
        self.slots = core.Slots(STEPS)

    def time_fill_steps(self) -> None:
        self.slots.fill_steps(self.steps)


class Rows:
    def setup(self) -> None:
        self.steps = make_ended()

    def time_copy_rows(self) -> None:
        core.copy_rows(self.steps)

    def time_unnest_arrays(self) -> None:
        core.unnest_arrays(self.steps)


def ns_per_step(suite: type[Any], method: str) -> float:
    """Least of 20 samples, each with its own setup."""
    samples = []
    for _ in range(20):
        instance = suite()
        instance.setup()
        body: Callable[[], None] = getattr(instance, method)
        began = perf_counter()
        body()
        samples.append(perf_counter() - began)
    return min(samples) / STEPS * 1e9


def track_step_through_the_core() -> float:
    """The sum of what every step of a plain group passes through, from its call to its row."""
    parts = [
        (Construction, "time_steps"),
        (Construction, "time_input_hashes"),
        (Scheduling, "time_add_all"),
        (Scheduling, "time_take"),
        (Frames, "time_add_step"),
        (Frames, "time_feed"),
        (Scheduling, "time_absorb"),
        (Results, "time_fill_steps"),
        (Rows, "time_copy_rows"),
    ]
    return sum(ns_per_step(suite, method) for suite, method in parts)


track_step_through_the_core.unit = "ns/step"  # type: ignore[attr-defined]


def go_through(rounds: int) -> None:
    """Steps through all that every step of a plain group passes through."""
    for _ in range(rounds):
        scheduler, place = core.Scheduler(), core.Place([STEPS, 0, 0])
        writer, reader = core.FrameWriter(), core.FrameReader()
        scheduler.add_all(make_steps())
        steps = scheduler.take(place, STEPS)
        for step in steps:
            writer.add_step(1, step, 3)
        writer.take()
        for step in steps:
            writer.add(DONE, step.number, 1_700_000_000_000_000, 15, b"", ANSWER)
        scheduler.absorb(reader.feed(writer.take()), DONE, 1)
        for step in steps:
            step.worker_id = step.group_id = b"w" * 16
        core.Slots(STEPS).fill_steps(steps)
        core.copy_rows(steps)


class Instructions:
    """Counted, not timed: by the processor where `perf` may ask it, else by callgrind."""

    timeout = 600

    def setup(self) -> None:
        if counted_instructions("pass") is None:
            raise NotImplementedError("neither perf nor valgrind can count here")

    def track_step_through_the_core(self) -> float:
        few, many = (counted_instructions(program_of(rounds)) for rounds in (2, 12))
        assert few is not None
        assert many is not None
        return (many - few) / (10 * STEPS)

    track_step_through_the_core.unit = "instructions"  # type: ignore[attr-defined]


def program_of(rounds: int) -> str:
    return f"from benchmarks.bench_core import go_through; go_through({rounds})"


def counted_instructions(program: str) -> int | None:
    """Of a Python program, in user mode; None where nothing can count them."""
    python = [sys.executable, "-c", program]
    # The checkout comes last: its own `kagzi` is not the one that was built to be measured.
    path = [*filter(None, sys.path), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(path)}
    counters = (
        (["perf", "stat", "-x,", "-e", "instructions:u"], r"^(\d+),[^,]*,instructions"),
        (["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"], r"Collected : (\d+)"),
    )
    for command, pattern in counters:
        if shutil.which(command[0]) is not None:
            done = subprocess.run(
                [*command, *python], env=environment, capture_output=True, text=True, check=False
            )
            found = re.search(pattern, done.stderr, re.MULTILINE)
            if done.returncode == 0 and found is not None:
                return int(found[1])
    return None


def main() -> None:
    for suite in (Construction, Scheduling, Frames, Results, Rows):
        for method in vars(suite):
            if method.startswith("time_"):
                print(f"{suite.__name__}.{method:<40}{ns_per_step(suite, method):8.1f} ns/step")
    print(f"{'track_step_through_the_core':<50}{track_step_through_the_core():8.1f} ns/step")


if __name__ == "__main__":
    main()
