"""Data sets, networks and studies: how well each fit does, on which problem, at what cost."""
