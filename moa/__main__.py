"""The `moa` command, also as `python -m moa`."""

from __future__ import annotations

import sys

from moa.cli.app import run


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
