"""Run the benchmarks as ``python -m bench``: ``gradprune bench`` without an installed command."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    runpy.run_module("gradprune", run_name="__main__")
