"""The examples run as they stand, each as the script that it is."""

import os
import re
from pathlib import Path

import pytest

from tests.scripts import ROOT, run_script

EXAMPLES = ROOT / "examples"


def test_crawl_reads_every_page_and_names_the_broken_links(dsn: str) -> None:
    printed = run_script(EXAMPLES / "crawl.py", dsn=dsn)

    assert "63 pages, 4 broken links" in printed
    assert printed.count("HTTP Error 404: no such page") == 4
    assert re.search(r"attempt 1 of level#3/\d failed, tried again", printed)
    assert "started again under the same id: new run False, 0 more requests" in printed


def test_order_refunds_only_what_could_not_be_shipped(dsn: str) -> None:
    printed = run_script(EXAMPLES / "order.py", dsn=dsn)

    assert "order A-1: paid 220.50, refunded 0\n" in printed
    assert "parcel A-1-NOR: lamp, desk" in printed
    assert "order A-2: paid 1099.00, refunded 1059.00\n" in printed
    assert re.search(r"ship/south/pick/unicorn +failed: no unicorn left", printed)
    assert "order.OutOfStock: no unicorn left" in printed
    assert printed.count("(2 attempts)") == 2


def test_cpu_batch_uses_several_processes(dsn: str) -> None:
    printed = run_script(EXAMPLES / "cpu_batch.py", dsn=dsn)

    assert "52074 primes below 640000" in printed
    speedup = float(re.search(r"speed-up ([\d.]+)", printed)[1])  # type: ignore[index]
    if (os.cpu_count() or 1) > 1:
        assert printed.count("  process ") > 1
        assert speedup > 1.2, printed


def test_agent_goes_on_under_a_second_worker(dsn: str) -> None:
    printed = run_script(EXAMPLES / "agent.py", dsn=dsn)

    assert printed.startswith("Cairo, with 28 degrees; the mean is 17.0\n")
    assert re.search(r"tools/1 +failed .*KeyError: 'Lisbo'", printed)
    assert "model#2: decided by call 1 of 2" in printed


def test_versions_tells_which_change_would_break_a_run(dsn: str) -> None:
    printed = run_script(EXAMPLES / "versions.py", dsn=dsn)
    assert "checked carelessly: would break:\n  A-1: " in printed
    assert "no longer asks for 'pack', " in printed
    assert "checked with a patch: no run would break\n" in printed
    assert "A-1: A-1 reserved, packed, shipped\n" in printed
    assert "A-2: A-2 reserved, wrapped as a gift, shipped\n" in printed
    assert "B-1: B-1 reserved, wrapped as a gift, shipped\n" in printed
    assert "B-2: B-2 reserved, wrapped as a gift, shipped\n" in printed
    assert "version 2 (default): 0 unfinished" in printed


def test_every_example_has_a_test() -> None:
    tested = set(re.findall(r'EXAMPLES / "(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_begins_by_saying_what_it_shows(path: Path) -> None:
    assert "\nShows: " in path.read_text().split('"""')[1]


def test_reports_come_once_for_each_tick(dsn: str) -> None:
    for _ in range(2):
        printed = run_script(EXAMPLES / "reports.py", dsn=dsn)
        runs, ticks = re.findall(r"(\d+) runs for (\d+) ticks, by two workers", printed)[0]
        assert runs == ticks
        assert len(re.findall(r"each second@\S+: north until [\d:]+: \d+ sold", printed)) >= 3
        assert re.search(r"nightly ticks next at .* 0[01]:[03]0:00\+00:00", printed)
