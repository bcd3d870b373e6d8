"""What passes stand on: the step graph and the roles in it, building nodes, regions, invariance, liveness, cost."""
