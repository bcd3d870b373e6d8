"""What a step becomes on a GPU, generated and compiled where there is none: kernels, calls, bytes, what they cost.

A process of its own (``worker``) loads a CUDA device that has nothing behind it (``device``), captures the step on
tensors without memory, and has Inductor generate what it would for a real GPU; Triton's compiler makes machine code of
it. Nothing is run: what is said of time is a static estimate.
"""
