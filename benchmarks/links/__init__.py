"""Parts of network.py: links of limited rate between processes, and the report."""
