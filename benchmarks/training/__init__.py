"""Times whole training steps of real processes, on links of any rate, and their memory."""
