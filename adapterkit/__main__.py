"""`python -m adapterkit`."""

from adapterkit.cli import process

if __name__ == "__main__":
    process()
