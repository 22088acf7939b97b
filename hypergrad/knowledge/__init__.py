"""What is known of a sweep beforehand: priors, earlier sweeps, costs, and who proposes."""
