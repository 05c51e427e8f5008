"""Pool processes import this file again: what it needs is imported behind the guard."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["dashboard"]:
        from kagzi.bench.dashboard import dashboard

        dashboard(sys.argv[2:], prog_name="python -m kagzi.bench dashboard")
    from kagzi.bench.command import main

    main(prog_name="python -m kagzi.bench")
