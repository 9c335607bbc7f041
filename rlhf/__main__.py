"""`python -m rlhf`, the same as `rlhf`."""

from rlhf.cli.main import entry

if __name__ == "__main__":
    entry()
