"""Parts of convergence.py and ablation.py: tasks, workers in one process, runs and their comparison."""
