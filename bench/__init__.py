"""The benchmarks: ``python -m bench`` from the repository root, ``gradprune bench`` once installed; one code.

``cases`` are the networks, ``baselines`` the ways to attack them, ``harness`` times the ways in turn, ``store`` keeps
what was measured as JSON, ``report`` shows it. Then there is a file per benchmark with its options, its records, its
table and its plot: ``step`` (``scaling``, ``ablation`` and ``overhead`` are the same otherwise), ``compile``,
``kernels``, ``attacks``, ``training``, ``tables`` (with the attacks of other libraries in files of its own),
``objectives``; and ``demo``, a preset. ``results`` is data.
"""
