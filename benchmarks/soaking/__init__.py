"""Parts of soak.py: what happens, who trains, who kills, what should have come of it, and whether it has."""
