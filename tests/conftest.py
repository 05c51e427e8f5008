"""Lists the fixtures; each file holds those of one subject."""

pytest_plugins = [
    "tests.fix_cluster",
    "tests.fix_db",
    "tests.fix_engine",
    "tests.fix_faults",
    "tests.fix_pgbouncer",
    "tests.fix_proxy",
]
