"""Makes links of limited rate between processes, and reports network.py's runs on them."""
