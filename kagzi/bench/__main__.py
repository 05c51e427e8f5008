"""Pool processes import this file again: what it needs is imported behind the guard."""

if __name__ == "__main__":
    from kagzi.bench.command import main

    main(prog_name="python -m kagzi.bench")
