"""What owns the loop of an attack: it compiles the model once, knows when weights are constant, and leaves no trace.

Attacks ask it for gradients and logits and know nothing of compilation; ``Runtime`` says how these are computed.
"""

from .query import Query, Runtime

__all__ = ["Query", "Runtime"]
