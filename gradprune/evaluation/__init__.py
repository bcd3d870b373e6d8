"""The ``gradprune attack`` and ``gradprune evaluate`` commands: models, data and attacks by name, and what came of it.

``command`` parses and orders the work; ``models`` and ``data`` load what is attacked, ``attacks`` makes attacks of
options; ``evaluate`` runs one on a data set, in batches that ``distributed`` deals out; ``records`` keeps what is done,
so that a second call goes on; ``tables`` and ``plots`` show it; ``work`` holds all of this together.
"""
