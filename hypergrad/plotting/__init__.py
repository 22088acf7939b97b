"""Pictures: of a run here, of a sweep in `hypergrad.plotting.sweeps`, which loads Optuna."""

from hypergrad.plotting.runs import (
    plot_losses,
    plot_norms,
    plot_run,
    plot_schedule,
    plot_trajectories,
)
from hypergrad.plotting.training_examples import plot_attribution
