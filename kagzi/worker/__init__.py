"""A worker's life: claims, heartbeat, incarnation, rescue."""

from kagzi.worker.keeper import Keeper
from kagzi.worker.worker import Worker

__all__ = ["Keeper", "Worker"]
