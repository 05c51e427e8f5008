"""`python -m kagzi.bench`: what kagzi costs, beside thresholds, goals and a floor.

command     options, progress, exit code
report      terminal tables, JSON
page        the report as one HTML file; charts draws for it
check       counts against those committed
against     comparison with other libraries, each behind a module of sides
suites      all benchmarks; of_steps, of_runs, of_machine, of_counts hold them
rounds      our work and the floor's take turns
session     a client and a worker on a schema of their own
apart       the same in a process of their own, told what to do by helper
work        the steps and workflows that are timed
floor       the same work by plain scripts that promise nothing
counters    the server's counters, processor time, memory
tap         counts what goes between programs and server
measure     medians, thresholds, the surroundings
"""
