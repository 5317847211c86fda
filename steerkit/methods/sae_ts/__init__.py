"""SAE-TS: what vectors do to the features of a text, the map that foresees it, and vectors aimed through it."""

from steerkit.lazy import lazily

MODULES = {
    "approximator": "steerkit.methods.sae_ts.approximator",
    "calibrate": "steerkit.methods.sae_ts.calibrate",
    "effects": "steerkit.methods.sae_ts.effects",
    "files": "steerkit.methods.sae_ts.files",
}
__getattr__, __dir__ = lazily(__name__, MODULES)
