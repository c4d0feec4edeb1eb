"""The `moa` command, also as `python -m moa`."""

from __future__ import annotations

import sys

from moa.cli.app import run
from moa.cli.output import open_standard_streams


def main() -> None:
    """Run the command line and leave with its exit code."""
    open_standard_streams()
    sys.exit(run())


if __name__ == "__main__":
    main()
