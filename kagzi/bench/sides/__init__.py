"""One module per side of a comparison: the same tasks, as that side's own documentation advises.

Each is run as a child process (`kagzi.bench.helper`) and knows some or all of these tasks. A task
gives seconds, `latency` a list of them.

group(size)                       steps that do nothing, at once; the body alone
pauses(size, seconds)             steps that wait, at once; the body alone
sequence(size)                    steps that do nothing, one after the other; the body alone
replay(size)                      the body alone, over the checkpoints of a group
race(size, winner_s, loser_s)     until one of the steps has won; the body alone
latency(count)                    runs of one step, each started when nothing else is under way
runs(count, steps)                runs of steps in sequence, at once; from start to last result
cpu(size, cpu_s)                  steps that compute, at once; the body alone
"""
