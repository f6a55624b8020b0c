"""The steps that a gradient goes through; reducer.py has their methods in order."""
