"""Crashes, lost connections, lost leases, and a harness that makes them.

`python -m tests.faults --seed N --minutes M` runs trials by hand: some runs of one kind, one fault
at one point, and what must hold when all is over. It prints its seed and each plan; `--replay` runs
a plan again, `--matrix` every point with every victim and every kind of run, `--only` a choice.

    points.py    where to strike, in the processes that come there
    victims.py   what strikes
    subjects.py  the workflows, which note what their bodies and eyes meet in a file
    actors.py    the processes: workers and clients
    oracle.py    what must hold, by that file and by triggers (audit.sql)
    broken.py    engines that are broken on purpose: the oracle must notice each
    trial.py     one trial
    soak.py      `--soak N`: so many workers, runs of every kind, faults at random moments
    zombies.py   `--zombies N`: so many workers, stopped by the dozen until others took over
    migrating.py `python -m tests.faults.migrating 200`: processes that migrate at once
"""
