"""What is known before a sweep and between its trials: priors, earlier sweeps, who proposes."""
