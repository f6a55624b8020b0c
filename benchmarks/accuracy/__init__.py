"""Compares what networks learn with DGC, with parts of it and without, over several seeds."""
