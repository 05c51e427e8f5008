"""`python -m tests.faults`: trials by hand. Every plan is printed, and can be replayed."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import replace

import click

from tests.faults.soak import soak
from tests.faults.trial import Plan, Report, Server, Trial, plans_of_matrix
from tests.faults.zombies import VICTIM, Count, Round, rounds


@click.command()
@click.option("--seed", type=int, default=None, help="Of the choice of plans; printed.")
@click.option("--minutes", type=float, default=1.0, help="How long, unless --matrix ends sooner.")
@click.option(
    "--matrix",
    is_flag=True,
    help="Every point, victim and program: the first time, if the nth misses.",
)
@click.option("--only", default="", help="Words that a plan must contain, such as 'hole group'.")
@click.option("--replay", default="", help="One plan, as it was printed.")
@click.option("--times", type=int, default=1, help="How often to replay it.")
@click.option("--soak", "workers", type=int, default=0, help="So many workers, faults at random.")
@click.option("--zombies", type=int, default=0, help="So many workers, stopped by the dozen.")
@click.option("--part", default="0/1", help="k/n: every nth plan of the matrix, from the kth on.")
def main(
    seed: int | None,
    minutes: float,
    matrix: bool,
    only: str,
    replay: str,
    times: int,
    workers: int,
    zombies: int,
    part: str,
) -> None:
    """Strike at the engine, and see what holds."""
    if seed is None:
        seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}", flush=True)
    plans = plans_of_matrix(seed)
    place, step = (int(number) for number in part.split("/"))
    plans = plans[place::step]
    plans = [plan for plan in plans if all(word in str(plan) for word in only.split())]
    if replay:
        plans = [Plan(**json.loads(replay))] * times
    elif not matrix:
        random.Random(seed).shuffle(plans)
    if workers:
        raise SystemExit(1 if soak_for(seed, workers, minutes) else 0)
    if zombies:
        raise SystemExit(1 if haunt(seed, zombies) else 0)
    reports: list[Report] = []
    until = time.monotonic() + minutes * 60
    with Server() as server:
        for number, plan in enumerate(plans):
            if time.monotonic() > until and not replay:
                print(f"time is up after {number} of {len(plans)}")
                break
            report = run_plan(server, plan)
            if matrix and not report.faults and not report.problems and plan.nth > 1:
                tell(report)
                report = run_plan(server, replace(plan, nth=1))
            reports.append(report)
            tell(report)
        failed = sum_up(reports)
        if failed:
            server.keep = True
            print(f"logs are kept in {server.folder}")
    raise SystemExit(1 if failed else 0)


def run_plan(server: Server, plan: Plan) -> Report:
    kind = Round if plan.victim == VICTIM else Trial
    return asyncio.run(kind(server, plan).run())


def soak_for(seed: int, workers: int, minutes: float) -> int:
    """Print what came of it; how many problems."""
    with Server() as server:
        report, struck = soak(server, seed, workers, minutes)
        tell(report)
        print(
            f"{report.runs} runs, {report.steps} steps, {report.executions} executions, "
            f"{report.refused} writes refused"
        )
        print("faults: " + ", ".join(f"{name} {count}" for name, count in sorted(struck.items())))
        if report.problems:
            server.keep = True
            print(f"logs are kept in {server.folder}")
    return len(report.problems)


def haunt(seed: int, zombies: int) -> int:
    """Print what came of each round, and of all; how many failed."""
    reports: list[Report] = []
    count = Count()
    with Server() as server:
        for report, count in rounds(server, seed, zombies):  # noqa: B007 - of all, in the end
            reports.append(report)
            tell(report)
        failed = sum_up(reports)
        print(count)
        if failed:
            server.keep = True
            print(f"logs are kept in {server.folder}")
    return failed


def tell(report: Report) -> None:
    word = "FAILED" if report.problems else "held" if report.faults else "missed"
    print(f"{word} {report.seconds:.1f} s {report.plan}", flush=True)
    for problem in report.problems[:12]:
        print(f"    {problem}", flush=True)


def sum_up(reports: list[Report]) -> int:
    """Print the counts; how many trials failed."""
    struck = Counter(report.plan.victim for report in reports if report.faults)
    failed = [report for report in reports if report.problems]
    print(
        f"{len(reports)} trials, {sum(struck.values())} with a fault, {len(failed)} failed; "
        f"{sum(r.runs for r in reports)} runs, {sum(r.steps for r in reports)} steps, "
        f"{sum(r.executions for r in reports)} executions, "
        f"{sum(r.refused for r in reports)} writes refused"
    )
    print("faults: " + ", ".join(f"{name} {count}" for name, count in sorted(struck.items())))
    return len(failed)


if __name__ == "__main__":
    main()
