"""Counts bytes for published networks, and projects measured steps to clusters."""
