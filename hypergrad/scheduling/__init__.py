"""Which runs are worth going on with: curves that are extrapolated."""
