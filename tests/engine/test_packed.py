"""Packed weights: the same numbers as torch's own layers and encoder, and the model as it was."""

import pytest
import tiny
import torch

from steerkit.engine.packed import packed_linears


@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_packed_linears_agree_with_torch_and_leave_the_model_as_it_was(dtype, near):
    model = tiny.model("llama").to(dtype)
    ids = torch.randint(5, 200, (3, 7))
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with packed_linears(model):
            fast = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain)
        torch.testing.assert_close(fast, plain, rtol=near, atol=near)
        model.lm_head.weight.mul_(2.0)  # a changed weight is packed again
        with packed_linears(model):
            torch.testing.assert_close(model(input_ids=ids).logits, 2 * plain, rtol=near, atol=10 * near)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_packed_linears_may_be_nested():
    model, ids = tiny.model("llama"), torch.randint(5, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with packed_linears(model):
            outer = model(input_ids=ids).logits
            with packed_linears(model):
                inner = model(input_ids=ids).logits
            assert torch.equal(inner, outer) and torch.equal(model(input_ids=ids).logits, outer)
    assert not any("forward" in module.__dict__ for module in model.modules())
