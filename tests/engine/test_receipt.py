"""The receipt: which tokens were changed and by how much, as a float64 oracle has it, and as text."""

import pytest
import tiny
import torch
from steered import padded, resid_of, unit

from steerkit.engine.steer import Add, steering


def test_receipt_equals_a_float64_oracle():
    model, (ids, mask) = tiny.model("llama"), padded()
    plain = resid_of(model, ids, mask, 1)[0].double()
    _, _, receipt = resid_of(model, ids, mask, 1, [Add(1, unit(), torch.tensor([1.0, 2.0, 3.0]))])
    for row, n in enumerate((3, 6, 1)):
        ratios = [float((row + 1.0) / plain[row, 6 - n + p].norm()) for p in range(n)]
        assert receipt.changed(row) == list(range(n))
        assert [receipt.ratios[1][row][p] for p in range(n)] == pytest.approx(ratios, rel=1e-4)
        assert receipt.ratio(row) == pytest.approx(sum(ratios) / n, rel=1e-4)


def test_receipt_renders_as_text_and_as_a_strip():
    model, tok = tiny.model("llama"), tiny.tokenizer()
    ids = torch.tensor([[1] + tok("ab<c", add_special_tokens=False)["input_ids"]])
    with steering(model, Add(1, unit(), 3.0), skip_first=True, tokenizer=tok) as receipt:
        model(input_ids=ids)
    text, strip = str(receipt), receipt._repr_html_()
    assert "4 of 5 positions changed" in text and "[b]" in text and "[<bos>]" not in text
    assert strip.count("background:rgba") == 4 and "&lt;" in strip and "position 2" in strip


def test_a_lab_is_steered_like_its_model_and_its_receipt_shows_text():
    """A model alone has no tokenizer, so its receipt shows token ids."""
    lab, (ids, mask) = tiny.lab(), padded()
    ids[mask.bool()] = torch.tensor(lab.tokenizer("abcdefghij", add_special_tokens=False)["input_ids"])
    shown = []
    for what in (lab, lab.hf):
        _, logits, receipt = resid_of(what, ids, mask, 1, [Add(1, unit(), 3.0)], window="last")
        shown.append((logits, [receipt.changed(row) for row in range(3)], str(receipt)))
    assert torch.equal(shown[0][0], shown[1][0]) and shown[0][1] == shown[1][1] == [[2], [5], [0]]
    assert "ab[c]" in shown[0][2] and "[j]" in shown[0][2] and f"[{int(ids[0, -1])}]" in shown[1][2] and "[c]" not in shown[1][2]
