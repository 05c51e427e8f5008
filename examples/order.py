"""Handle orders: take the money, ship from several warehouses at once, refund what is not there.

Shows: groups within groups (a step that takes a Context opens groups of its own), retries, a key
that makes a repeated side effect harmless, and what each failure leads to.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from decimal import Decimal

import kagzi
from kagzi import Context, ErrorStrategy, Retry, RunDetails


@dataclass
class Item:
    name: str
    price: Decimal


@dataclass
class Order:
    number: str
    baskets: dict[str, list[Item]]  # by warehouse


@dataclass
class Parcel:
    warehouse: str
    items: list[str]
    label: str


@dataclass
class Receipt:
    paid: Decimal
    refunded: Decimal
    parcels: list[Parcel]


class CardServiceBusy(Exception):
    """Comes and goes: worth another attempt."""


class OutOfStock(Exception):
    """Stays: another attempt finds the shelf as empty."""


# A body may run more than once (here: always twice). What it does to the world must bear that:
# the service would see the same idempotency key both times, and charge once.
@kagzi.step(retry=Retry(max_attempts=4, initial=0.05, on=CardServiceBusy))
async def charge(number: str, amount: Decimal) -> str:
    step = kagzi.current_step()
    if step.attempt == 1:
        raise CardServiceBusy("no answer from the card service")
    return f"payment of {amount} under key …{step.idempotency_key[-11:]}"


@kagzi.step(retry=Retry(max_attempts=4, initial=0.05, on=CardServiceBusy))
async def refund(number: str, amount: Decimal) -> Decimal:
    return amount


@kagzi.step
async def pick(item: Item) -> str:
    await asyncio.sleep(0.05)  # somebody walks to the shelf
    if item.name == "unicorn":
        raise OutOfStock(f"no {item.name} left")
    return item.name


@kagzi.step
async def print_label(number: str, warehouse: str) -> str:
    await asyncio.sleep(0.05)
    return f"{number}-{warehouse[:3].upper()}"


@kagzi.step
async def book_courier(warehouse: str) -> None:
    await asyncio.sleep(0.05)


# A step that asks for a Context may start steps itself. Their ids lie below its own.
@kagzi.step
async def ship(ctx: Context, number: str, warehouse: str, items: list[Item]) -> Parcel:
    picking = ctx.map("pick", pick, items, key=lambda item: item.name)
    paper = ctx.parallel("paper", print_label.bind(number, warehouse), book_courier.bind(warehouse))
    label, _ = await paper
    return Parcel(warehouse, await picking, label)


@kagzi.workflow
async def handle_order(ctx: Context, order: Order) -> Receipt:
    prices = {
        warehouse: sum((item.price for item in items), Decimal(0))
        for warehouse, items in order.baskets.items()
    }
    paid = sum(prices.values(), Decimal(0))
    await ctx.step(charge, order.number, paid)

    shipping = await ctx.parallel(
        "ship",
        {w: ship.bind(order.number, w, items) for w, items in order.baskets.items()},
        on_error=ErrorStrategy.COLLECT_ALL,
    )
    back = Decimal(0)
    warehouses = list(order.baskets)
    for warehouse in (warehouses[index] for index in shipping.errors):
        back += await ctx.step(refund, order.number, prices[warehouse], name=f"refund-{warehouse}")
    return Receipt(paid, back, [parcel for parcel in shipping.values if parcel is not None])


def show(run: RunDetails) -> None:
    """The steps of a run as a tree: a step's parent is the step that started it."""
    for step in sorted(run.steps, key=lambda step: step.id):
        depth = 2 if step.parent_step_id else 1
        note = f"  ({step.attempts} attempts)" if step.attempts > 1 else ""
        if step.error is not None:
            note = f": {step.error.message}"
        print(f"{'    ' * depth}{step.id:24} {step.status}{note}")


async def main() -> None:
    orders = [
        Order(
            "A-1",
            {
                "north": [Item("lamp", Decimal("40.00")), Item("desk", Decimal("120.50"))],
                "south": [Item("chair", Decimal("60.00"))],
            },
        ),
        Order(
            "A-2",
            {
                "north": [Item("lamp", Decimal("40.00"))],
                "south": [Item("chair", Decimal("60.00")), Item("unicorn", Decimal("999.00"))],
            },
        ),
    ]
    async with kagzi.connect() as client, client.worker(processes=2):
        handles = [await client.start(handle_order, order) for order in orders]
        for order, handle in zip(orders, handles, strict=True):
            receipt = await handle.result(timeout=60)
            print(f"order {order.number}: paid {receipt.paid}, refunded {receipt.refunded}")
            for parcel in receipt.parcels:
                print(f"  parcel {parcel.label}: {', '.join(parcel.items)}")
            show(await handle.describe())


if __name__ == "__main__":
    asyncio.run(main())
