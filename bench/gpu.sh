#!/usr/bin/env bash
# All there is to find out on a GPU, in slices: bench/gpu.sh --output DIR, again and again until it has nothing left to
# do. PYTHON is the Python that has torch. See bench/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m bench gpu "$@"
