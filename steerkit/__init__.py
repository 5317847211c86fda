"""steerkit: the steering hook and the scoring code beneath the notebooks."""

import warnings

# Plain progress bars are meant: widgets are dead in a saved notebook.
warnings.filterwarnings("ignore", message="IProgress not found")
