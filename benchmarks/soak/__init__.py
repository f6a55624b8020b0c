"""Trains for a long time while everything goes wrong, and checks that nothing is lost."""
