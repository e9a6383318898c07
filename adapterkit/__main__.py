"""`python -m adapterkit`."""

from adapterkit.cli import main

if __name__ == "__main__":
    main()
