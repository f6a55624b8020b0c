"""What the tests share: models, oracles, processes to run in, and workers to be killed."""
