"""The exchange: the collectives that ranks send gradients by."""
