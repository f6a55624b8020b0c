"""Rounds of dgc.LocalSteps: how one goes, what islands compare before it, and what is saved between two."""
