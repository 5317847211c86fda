"""A trained vector: it lowers the loss that it is trained on, beyond where it starts, and leaves the model as it was."""

import pytest
import tiny
import torch

from steerkit.methods.learned import learned
from steerkit.scores.capability import steered_losses
from steerkit.vectors import random_direction

TEXTS = ["aaaaaa", "aaaa aaaa", "aaaaaaaaaaa"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_lowers_the_loss_and_changes_no_weight(kind):
    at = tiny.lab(kind, saes={}).at(1)
    start, before = random_direction(at), [p.clone() for p in at.model.parameters()]
    wants = [p.requires_grad for p in at.model.parameters()]
    found = learned(at, TEXTS, start, scale=8.0, steps=40)
    unsteered, first, last = steered_losses(at, TEXTS, 8.0 * torch.stack([0 * start.direction, start.direction, found.direction]), [1.0])[
        :, 0
    ].mean(-1)
    assert last < min(first, unsteered) - 0.3
    assert found.direction.norm() == pytest.approx(1, abs=1e-5) and found.name == "learned"
    assert all(torch.equal(a, b) for a, b in zip(before, at.model.parameters()))
    assert [p.requires_grad for p in at.model.parameters()] == wants and all(p.grad is None for p in at.model.parameters())


def test_no_texts_or_a_start_of_another_place_are_refused():
    lab = tiny.lab("llama", saes={})
    for texts, layer in (([], 1), (TEXTS, 0)):
        with pytest.raises(ValueError, match="expected texts and a start at layer 1"):
            learned(lab.at(1), texts, random_direction(lab.at(layer)), scale=1.0)
