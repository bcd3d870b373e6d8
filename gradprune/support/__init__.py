"""Files, progress, environment, processes: what has nothing to do with attacks or compilers."""
