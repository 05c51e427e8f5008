"""All benchmarks, in the order in which they are run.

What is compared takes turns within a round, and quotients are taken round by round: on a machine
that others use, they hold where times do not.
"""

from kagzi.bench import of_counts, of_machine, of_runs, of_steps
from kagzi.bench.catalogue import Suite

_FOUND = of_steps.SUITES | of_runs.SUITES | of_machine.SUITES | of_counts.SUITES

SUITES: dict[str, Suite] = {
    name: _FOUND[name]
    for name in (
        "coordination",
        "parallel_vs_sequential",
        "memoisation",
        "race",
        "sequence",
        "latency",
        "throughput",
        "cpu",
        "memory",
        "payloads",
        "counts",
        "stream",
        "large",
        "resume",
    )
}
