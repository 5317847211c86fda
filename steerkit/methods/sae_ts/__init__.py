"""SAE-TS: what vectors do to the features of a text, the map that foresees it, and vectors aimed through it."""

from steerkit.lazy import lazily

MODULES = {
    "approximator": "steerkit.methods.sae_ts.approximator",
    "calibration": "steerkit.methods.sae_ts.calibration",
    "effects": "steerkit.methods.sae_ts.effects",
    "published": "steerkit.methods.sae_ts.published",
}
__getattr__, __dir__ = lazily(__name__, MODULES)
