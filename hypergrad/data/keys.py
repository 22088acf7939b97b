"""Whose random stream is whose: the numbers that are folded into a run's key."""

# Streams of randomness that must not meet one another nor the training steps' own, which are
# fold_in(key, t): of minibatches, validation, particles, linear solvers and directions.
SHUFFLE, VALID, NOISE, SOLVER = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD, 0xFFFFFFFC
DIRECTION = 0xFFFFFFFB
