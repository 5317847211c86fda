"""CorrSteer: features that go along with right answers, chosen by correlation, steered and compared with rivals."""

from steerkit.lazy import lazily

MODULES = {
    "answers": "steerkit.methods.corrsteer.answers",
    "correlation": "steerkit.methods.corrsteer.correlation",
    "trial": "steerkit.methods.corrsteer.trial",
    "lora": "steerkit.methods.corrsteer.lora",
    "nulls": "steerkit.methods.corrsteer.nulls",
    "pooled": "steerkit.methods.corrsteer.pooled",
    "pooling": "steerkit.methods.corrsteer.pooling",
    "select": "steerkit.methods.corrsteer.select",
}
__getattr__, __dir__ = lazily(__name__, MODULES)
