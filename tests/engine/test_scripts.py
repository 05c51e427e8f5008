"""A script is `__main__` in its own process and `__mp_main__` in the pool: nobody should notice."""

from pathlib import Path

import psutil
import pytest

from tests.scripts import run_script

SCRIPT = """
from dataclasses import dataclass

import kagzi
from kagzi import Context, Retry, StepFailed


@dataclass
class Cat:
    age: int


@dataclass
class Dog:
    age: int


class Lost(Exception):
    pass


class LostFarAway(Lost):
    pass


@kagzi.step
async def adopt(age: int) -> Cat | Dog:
    return Cat(age) if age % 2 else Dog(age)


@kagzi.step(where="pool")
async def kind(pet: Cat | Dog) -> str:
    return type(pet).__name__


@kagzi.step
async def find() -> int:
    if kagzi.current_step().attempt == 1:
        raise LostFarAway("come back")
    return kagzi.current_step().attempt


@kagzi.step
async def adopt_two(ctx: Context) -> list[Cat | Dog]:
    return await ctx.map("pets", adopt, [1, 2])


@kagzi.workflow
async def day(ctx: Context) -> list[str]:
    pets = await ctx.step(adopt_two)
    told = [type(pet).__name__ for pet in pets] + await ctx.map("kinds", kind, pets)
    try:
        await ctx.step(find)
    except StepFailed as failure:
        told.append(f"{failure.type} {failure.is_a(Lost)} {failure.is_a(Cat)}")
    again = Retry.fixed(2, delay=0.01, on=Lost)
    told.append(f"attempt {await ctx.step(find.bind().options(retry=again))}")
    return told


if __name__ == "__main__":
    print(kagzi.run(day, processes=1))
    print(day.name)
"""


@pytest.mark.parametrize("how", ["pets.py", "-m pets"])
def test_own_classes_of_a_script_are_the_same_in_the_pool(
    how: str, dsn: str, tmp_path: Path
) -> None:
    (tmp_path / "pets.py").write_text(SCRIPT)

    told, name = run_script(*how.split(), dsn=dsn, cwd=tmp_path).splitlines()

    assert told == str(["Cat", "Dog", "Cat", "Dog", "pets.LostFarAway True False", "attempt 2"])
    assert name == "pets.day"


FAILING = """
import kagzi


@kagzi.step
def divide(n: int) -> float:
    return 1 / n


@kagzi.workflow
async def share(ctx: kagzi.Context) -> float:
    return await ctx.step(divide, 0)


if __name__ == "__main__":
    import traceback

    try:
        kagzi.run(share, id="shares", processes=1)
    except kagzi.StepFailed:
        print(traceback.format_exc())
"""


def test_what_a_failed_run_prints_leads_to_the_line_that_failed(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "shares.py").write_text(FAILING)

    printed = run_script("shares.py", dsn=dsn, cwd=tmp_path)

    assert "Recorded in run 'shares':" in printed
    assert 'shares.py", line 7, in divide' in printed
    assert printed.rstrip().endswith("ZeroDivisionError: division by zero")


NOTEBOOK = """
import asyncio
import warnings

import kagzi

warnings.simplefilter("error")


@kagzi.workflow
async def nothing(ctx: kagzi.Context) -> None: ...


async def cell() -> None:
    try:
        kagzi.run(nothing)
    except RuntimeError as error:
        print(error)


asyncio.run(cell())
"""


def test_run_within_a_running_loop_says_what_to_use(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "notebook.py").write_text(NOTEBOOK)

    assert "async with kagzi.connect()" in run_script("notebook.py", dsn=dsn, cwd=tmp_path)


LEAVING = """
import asyncio
import sys

import kagzi
import psutil


async def main():
    client = await kagzi.connect().__aenter__()
    block = client.worker(processes=2)
    return client, block, await block.__aenter__()


if __name__ == "__main__":
    loop = asyncio.new_event_loop()
    left = loop.run_until_complete(main())
    print(*(process.pid for process in psutil.Process().children(recursive=True)))
    sys.stderr.close()  # what asyncio says of what was left
"""


def test_program_that_ends_without_closing_its_worker_ends_and_its_pool_with_it(
    dsn: str, tmp_path: Path
) -> None:
    (tmp_path / "leaving.py").write_text(LEAVING)

    left = run_script("leaving.py", dsn=dsn, cwd=tmp_path).split()

    assert len(left) >= 2
    processes = [psutil.Process(int(pid)) for pid in left if psutil.pid_exists(int(pid))]
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
