"""steerkit: the steering hook and the scoring code beneath the notebooks."""

import os
import warnings

# A decode is thousands of small products, and OpenMP's threads spin at the end of each until all are there. Beside one busy
# process that costs several times the work. Sleeping soon costs a few per cent. Read when torch is loaded, so before it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Plain progress bars are meant: widgets are dead in a saved notebook.
warnings.filterwarnings("ignore", message="IProgress not found")
