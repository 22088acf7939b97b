"""What one choice costs: examples per step, steps of a full run, programs to compile."""
