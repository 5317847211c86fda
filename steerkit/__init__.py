"""steerkit: the steering hook and the scoring code beneath the notebooks."""
