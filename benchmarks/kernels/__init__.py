"""Times the compression step alone, on a CPU and on a GPU, and checks a machine's GPU."""
