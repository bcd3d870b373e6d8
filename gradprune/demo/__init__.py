"""The ``gradprune demo`` command: four ways to run one attack, side by side, on data that needs no download.

``command`` parses and orders the work; ``photos``, ``digits`` and ``models`` make the two workloads; ``attack`` is
the attack that every candidate of ``candidates`` runs; ``workload`` and ``measure`` take the figures; ``table``,
``picture``, ``environment`` and ``files`` write them down.
"""
