"""`kagzi demo`: measures Python's standard library by a workflow, and shows what that survives.

sources   finds the files, and measures one
steps     the steps and workflows, which pool processes import
tour      runs them, runs them again, and tells speed-up, cached steps and the slowest modules
crash     kills its worker half-way and proves that no committed step ran again
"""

from kagzi.demo.crash import show_crash
from kagzi.demo.tour import show_tour

__all__ = ["show_crash", "show_tour"]
