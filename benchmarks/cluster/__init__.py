"""Parts of scaling.py and wire_ratio.py: shapes of known networks, what an exchange costs, and its projection."""
