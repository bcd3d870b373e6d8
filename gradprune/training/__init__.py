"""Adversarial training whose inner attack and outer step are compiled separately.

trainer = AdversarialTrainer(model, optimizer, PGDTraining(attack=PGD(eps=8 / 255)))
"""

from .batches import LinearEps, Metrics
from .fit import History
from .objectives import AWP, MART, OBJECTIVES, TRADES, Fast, Free, NearPGD, Objective, PGDTraining, Plain
from .trainer import AdversarialTrainer

__all__ = [
    "AWP",
    "MART",
    "OBJECTIVES",
    "TRADES",
    "AdversarialTrainer",
    "Fast",
    "Free",
    "History",
    "LinearEps",
    "Metrics",
    "NearPGD",
    "Objective",
    "PGDTraining",
    "Plain",
]
