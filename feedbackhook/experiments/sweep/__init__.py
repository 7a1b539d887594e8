"""Many runs: the grid, and where its runs are trained."""
