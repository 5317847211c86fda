"""Output scores: which features move the output, and what a filter on them buys."""

from steerkit.lazy import lazily

MODULES = {
    "inputs": "steerkit.methods.output_scores.inputs",
    "own_concept": "steerkit.methods.output_scores.own_concept",
    "score": "steerkit.methods.output_scores.score",
    "success": "steerkit.methods.output_scores.success",
}
__getattr__, __dir__ = lazily(__name__, MODULES)
