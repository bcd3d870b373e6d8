"""Models and data that the command lines and benchmarks run on: networks, data sets, digits, photographs."""
