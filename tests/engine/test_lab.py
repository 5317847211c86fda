"""An open model and its places: which layer, which SAE, and the tokens of a text."""

import numpy as np
import pytest
import tiny
import torch

from steerkit.engine.lab import Lab
from steerkit.models import load


@pytest.mark.parametrize("primary", [0, 2])
def test_a_place_is_the_presets_own_unless_a_layer_is_named(primary):
    plain = tiny.lab()
    plain.preset.primary_layer = primary
    assert (plain.at().layer, plain.at(-1).layer, plain.at(1).layer, plain.at(np.int64(0)).layer) == (primary, primary, 1, 0)
    for wrong in (3, -2):
        with pytest.raises(ValueError, match=f"tiny: expected a layer from 0 to 2, got {wrong}"):
            plain.at(wrong)


def test_a_place_knows_what_belongs_to_it():
    lab = tiny.lab("gpt2", outlier=3.0)
    at = lab.at(1)
    assert (at.lab, at.model, at.tokenizer, at.sae) == (lab, lab.hf, lab.tokenizer, lab.saes[1])
    assert (at.preset, at.outlier, at.d_model) == ("tiny", 3.0, tiny.D_MODEL)
    assert lab.block(1) is lab.hf.transformer.h[1]


def test_an_sae_that_is_not_there_is_named_with_those_that_are():
    sae = tiny.planted_sae()
    lab = tiny.lab(saes={0: sae, 2: sae})
    at = lab.at(1)  # a place without an SAE can still be read and steered
    for ask in (lambda: at.sae, lambda: lab.sae(1)):
        with pytest.raises(ValueError, match=r"tiny: no SAE for layer 1; layers with an SAE: \[0, 2\]"):
            ask()
    assert Lab(lab.preset, lab.hf, lab.tokenizer, {1: sae}).at(1).sae is sae


def test_tokens_are_left_padded(hub, tmp_path):
    lab = load.open(tiny.local_preset(hub, tmp_path), check=False)
    ids, mask = lab.tokens(["abc", "a<eos>"])
    plain = [lab.tokenizer.convert_tokens_to_ids(list("abc")), [lab.tokenizer.convert_tokens_to_ids("a"), 2]]
    assert ids.tolist() == [[1, *plain[0]], [0, 1, *plain[1]]] and mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    ids, mask = lab.tokens(["abc"], bos=False)
    assert ids.tolist() == [plain[0]] and mask.tolist() == [[1, 1, 1]]
    chat, _ = lab.tokens(["Hi"], chat=True)
    assert lab.tokenizer.decode(chat[0]) == "<bos>[user] Hi\n[assistant] "
    assert torch.equal(load.bridge(lab).to_tokens("abc"), lab.tokens(["abc"])[0])
    for wrong in ([], [""]):
        with pytest.raises(ValueError, match="at least one token"):
            lab.tokens(wrong, bos=False)
    with pytest.raises(ValueError, match="expected a list of strings"):
        lab.tokens("abc")
    lab.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        lab.tokens(["Hi"], chat=True)
