"""Mathematics of rectified flow: interpolation, sigma schedules, stochastic steps, solvers, advantages."""

from posttrain.flow.rectified import (
    expand,
    guided,
    interpolate,
    log_prob,
    predicted_x0,
    shift_sigma,
    stochastic_step,
)

__all__ = ["expand", "guided", "interpolate", "log_prob", "predicted_x0", "shift_sigma", "stochastic_step"]
