"""The benchmarks: ``python -m bench`` from the repository root, ``gradprune bench`` once installed; one code.

``command`` parses and orders the work; ``cases`` are the networks, ``baselines`` the ways to attack them; ``measure``
times the ways in turn and checks them, ``kernels`` times the layers alone, ``first_step`` compiles in processes of its
own, ``attacks`` times whole attacks, of which ``attack_candidates`` are the ways; ``record`` keeps what was measured as
JSON, ``tables`` and ``plot`` show it. ``results`` is data, not part of the package.
"""
