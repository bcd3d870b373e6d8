"""The experiments of papers about adversarial robustness, each one command: ``gradprune study NAME``."""
