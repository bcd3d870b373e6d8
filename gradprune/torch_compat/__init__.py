"""The only place that touches private parts of torch, read in torch 2.11 and 2.13: Dynamo's, AOTAutograd's, Inductor's.

Importing it refuses a torch outside of the supported range: a private function that moved would fail somewhere inside a
compilation.
"""

from .version import check_version

check_version()
