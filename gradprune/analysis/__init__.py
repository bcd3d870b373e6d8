"""What a step graph costs: which nodes run backward, FLOPs by class, bytes kept alive."""
