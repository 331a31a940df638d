"""What a run stands on: the mesh, its processes, checkpoints."""
