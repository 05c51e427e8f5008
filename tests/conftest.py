"""Lists the fixtures; each file holds those of one subject."""

from hypothesis import HealthCheck, settings

pytest_plugins = [
    "tests.fix_cluster",
    "tests.fix_db",
    "tests.fix_engine",
    "tests.fix_faults",
    "tests.fix_pgbouncer",
    "tests.fix_proxy",
]

# A machine that stalls makes any example slow.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
