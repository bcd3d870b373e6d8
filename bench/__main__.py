"""Run the benchmarks as ``python -m bench``: ``gradprune bench`` without an installed command."""

from __future__ import annotations

import sys

from gradprune.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
