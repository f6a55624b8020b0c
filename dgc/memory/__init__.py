"""What one rank keeps: momentum u and residual v of every parameter, by name."""
