"""`python -m kagzi`: the command line."""

from kagzi.cli import main

if __name__ == "__main__":
    main(prog_name="kagzi")
