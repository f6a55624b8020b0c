"""The way of one gradient, top to bottom: reducer.py has its verbs in their order."""
