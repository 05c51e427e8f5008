"""`python -m kagzi.bench`: the specification's benchmarks, beside their thresholds and a floor.

command     options, progress, exit code
report      terminal table, JSON
suites      what is measured, and what is asked of it
session     a client and a worker on a schema of their own
work        the steps and workflows that are timed
floor       the same work by plain scripts that promise nothing
measure     medians, thresholds, the server's counters, the surroundings
"""
