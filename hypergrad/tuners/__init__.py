"""The outer loop as pairs of pure functions: one file per way of running it."""
