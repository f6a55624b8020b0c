"""Measures what dgc costs, saves and keeps: a program a file, started with `python -m` from the repository's root."""
