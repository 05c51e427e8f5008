"""An agent: a model decides which tools to call, the tools run in parallel, until it has an answer.

Shows: a loop whose course depends on the results of its steps, a race of two providers, tools whose
failures go back to the model, and a run that goes on where it was after its worker is gone.

The model is a few rules, so the example needs no key and no network.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import kagzi
from kagzi import Call, Context, ErrorStrategy

MOST_TURNS = 8

# --- what the model and the workflow say to each other --------------------------------------


@dataclass
class ToolUse:
    tool: str
    argument: str


@dataclass
class Observation:
    use: ToolUse
    text: str
    is_error: bool = False


@dataclass
class Decision:
    """Either tools to use, or an answer."""

    uses: list[ToolUse] = field(default_factory=list)
    answer: str | None = None


def think(question: str, seen: list[Observation]) -> Decision:
    """Stands for a large language model."""
    known = {o.use.argument: o.text for o in seen if not o.is_error}
    if not seen:
        cities = [word for word in question.replace("?", "").split() if word.istitle()][1:]
        return Decision([ToolUse("weather", city) for city in cities])
    wrong = [o.use.argument for o in seen if o.is_error and o.use.argument + "n" not in known]
    if wrong:
        return Decision([ToolUse("weather", city + "n") for city in wrong])
    degrees = {city: int(text) for city, text in known.items() if text.lstrip("-").isdigit()}
    if not any(o.use.tool == "average" for o in seen):
        return Decision([ToolUse("average", " ".join(str(d) for d in degrees.values()))])
    warmest = max(degrees, key=lambda city: degrees[city])
    mean = next(o.text for o in seen if o.use.tool == "average")
    return Decision(answer=f"{warmest}, with {degrees[warmest]} degrees; the mean is {mean}")


# --- steps ----------------------------------------------------------------------------------


@kagzi.step
async def ask_fast_provider(question: str, seen: list[Observation]) -> Decision:
    await asyncio.sleep(0.03)
    if len(seen) == 3:
        raise ConnectionError("the fast provider is overloaded")
    return think(question, seen)


@kagzi.step
async def ask_slow_provider(question: str, seen: list[Observation]) -> Decision:
    await asyncio.sleep(0.2)
    return think(question, seen)


@kagzi.step(name="weather")
async def look_up_weather(city: str) -> str:
    await asyncio.sleep(0.1)
    return str({"Oslo": 4, "Lisbon": 19, "Cairo": 28}[city])


@kagzi.step(name="average")
def average(numbers: str) -> str:
    values = [int(number) for number in numbers.split()]
    return f"{sum(values) / len(values):.1f}"


def tool_call(use: ToolUse) -> Call[Any]:
    match use.tool:
        case "weather":
            return look_up_weather.bind(use.argument)
        case "average":
            return average.bind(use.argument)
    raise ValueError(f"the model asks for a tool that is not there: {use.tool}")


# --- the workflow ---------------------------------------------------------------------------


@kagzi.workflow
async def answer(ctx: Context, question: str) -> str:
    seen: list[Observation] = []
    for _ in range(MOST_TURNS):
        # Whoever answers first decides. That decision is recorded: after a crash the agent does
        # not change its mind.
        won = await ctx.race(
            "model",
            {
                "fast": ask_fast_provider.bind(question, seen),
                "slow": ask_slow_provider.bind(question, seen),
            },
        )
        decision = won.value
        if decision.answer is not None:
            return decision.answer
        results = await ctx.parallel_vec(
            "tools",
            [tool_call(use) for use in decision.uses],
            on_error=ErrorStrategy.COLLECT_ALL,
        )
        for index, use in enumerate(decision.uses):
            failure = results.errors.get(index)
            if failure is None:
                seen.append(Observation(use, str(results.values[index])))
            else:
                text = f"{failure.type}: {failure.message}"
                seen.append(Observation(use, text, is_error=True))
    raise RuntimeError(f"no answer within {MOST_TURNS} turns")


async def main() -> None:
    async with kagzi.connect() as client:
        # The first worker leaves in the middle of it ...
        async with client.worker(processes=1):
            handle = await client.start(answer, "Which is warmest: Oslo Lisbo Cairo?")
            with suppress(TimeoutError):
                await handle.result(timeout=0.2)
        before = {step.id for step in (await handle.describe()).steps}
        # ... and a second one goes on where it was. What is recorded does not run again.
        async with client.worker(processes=2):
            print(await handle.result(timeout=60))

        run = await handle.describe()
        for step in run.steps:
            worker = "first" if step.id in before else "second"
            note = "" if step.error is None else f"  {step.error.type}: {step.error.message}"
            print(f"  {step.id:14} {step.status:10} {worker} worker{note}")
        for group in run.groups:
            if group.kind == "race":
                print(f"  {group.path}: decided by call {group.decided_index} of {group.size}")


if __name__ == "__main__":
    asyncio.run(main())
