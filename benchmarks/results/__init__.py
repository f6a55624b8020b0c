"""Holds what the benchmarks wrote, and puts it on one page."""
