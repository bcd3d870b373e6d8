"""Run the command line as ``python -m gradprune``."""

from __future__ import annotations

import sys

from gradprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
