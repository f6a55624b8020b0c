"""The memory of one rank: momentum u and residual v, by parameter name."""
