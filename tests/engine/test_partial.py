"""Running the upper blocks only equals the whole model, on every architecture."""

import pytest
import tiny
import torch

from steerkit.engine.partial import starting_from
from steerkit.engine.steer import Add, steering
from steerkit.features import residuals


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "qwen3", "gpt2", "gptneox"])
@pytest.mark.parametrize("layer", [0, 1])
def test_upper_blocks_equal_the_whole_model(kind, layer):
    model, ids = tiny.model(kind), torch.randint(5, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    resid = residuals(model, ids, layers=[layer])[layer]
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
        with starting_from(model, layer, resid):
            upper = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(whole, upper)
        assert torch.equal(whole, model(input_ids=ids, use_cache=False).logits)  # nothing is left behind


def test_a_changed_stream_is_a_steered_model():
    model, ids = tiny.model("llama"), torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(1))
    vector = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(2))
    resid = residuals(model, ids, layers=[1])[1]
    with torch.inference_mode(), steering(model, Add(1, vector, 2.0)):
        hooked = model(input_ids=ids, use_cache=False).logits
    with torch.inference_mode(), starting_from(model, 1, resid + 2.0 * vector):
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, hooked)


def test_wrong_layer_and_wrong_shape_are_clear_errors_and_leave_nothing():
    model, ids = tiny.model("llama"), torch.ones(2, 3, dtype=torch.long)
    resid = torch.zeros(2, 3, tiny.D_MODEL)
    with pytest.raises(ValueError, match="expected 0 to 2"), starting_from(model, 3, resid):
        pass
    before = model(input_ids=ids).logits
    with pytest.raises(ValueError, match=r"\[2, 3\], got \[1, 3\]"), starting_from(model, 1, resid):
        model(input_ids=ids[:1])
    assert torch.equal(before, model(input_ids=ids).logits)
