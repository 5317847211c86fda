"""steerkit: the steering hook and the scoring code beneath the notebooks; `python -m steerkit` lists what there is."""

import os
import warnings

from steerkit.lazy import lazily

# A decode is thousands of small products, and OpenMP's threads spin at the end of each until all are there. Beside one busy
# process that costs several times the work. Sleeping soon costs a few per cent. Read when torch is loaded, so before it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Plain progress bars are meant: widgets are dead in a saved notebook.
warnings.filterwarnings("ignore", message="IProgress not found")

PUBLIC = {  # name -> the module that defines it, or that it is
    "open": "steerkit.models.load",
    "preset": "steerkit.models.presets",
    "presets": "steerkit.models.presets",
    "concepts": "steerkit.concept",
    "steering": "steerkit.engine.steer",
    "Add": "steerkit.engine.edits",
    "Ablate": "steerkit.engine.edits",
    "Boost": "steerkit.engine.edits",
    "generate": "steerkit.engine.generate",
    "grid": "steerkit.engine.generate",
    "Arm": "steerkit.engine.generate",
    "Sampling": "steerkit.engine.decode",
    "Work": "steerkit.store",
    "SteeringVector": "steerkit.vectors",
    "caa": "steerkit.vectors",
    "sae_row": "steerkit.vectors",
    "random_direction": "steerkit.vectors",
    "feature_means": "steerkit.features",
    "logit_lens": "steerkit.features",
    "residuals": "steerkit.features",
    "sae_ts": "steerkit.methods.sae_ts",
    "fgaa": "steerkit.methods.fgaa",
    "output_scores": "steerkit.methods.output_scores",
    "corrsteer": "steerkit.methods.corrsteer",
    "bcs": "steerkit.scores.bcs",
    "axbench": "steerkit.scores.axbench",
    "capability": "steerkit.scores.capability",
    "stats": "steerkit.stats",
}
__getattr__, __dir__ = lazily(__name__, PUBLIC)
__all__ = list(PUBLIC)
