"""Batches halved where memory is short, and losses without all logits, against whole batches and transformers' own logits."""

import pytest
import tiny
import torch

from steerkit import features
from steerkit.engine import losses
from steerkit.engine.memory import halving
from steerkit.methods.sae_ts import effects
from steerkit.scores import capability
from steerkit.store import Work

KINDS = ["gemma2", "gemma3", "llama", "qwen3", "gpt2", "gptneox"]
SHORT = [torch.OutOfMemoryError("pretend"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]


@pytest.mark.parametrize("error", SHORT, ids=lambda e: type(e).__name__)
def test_a_batch_is_halved_until_it_fits_and_nothing_is_done_twice(error):
    done = []

    def do(batch):
        if len(batch) > 3:
            raise error
        done.append(list(batch))
        return sum(batch)

    assert halving(do, range(1, 11)) == [3, 12, 13, 27] and done == [[1, 2], [3, 4, 5], [6, 7], [8, 9, 10]]
    with pytest.raises(type(error)):
        halving(lambda batch: (_ for _ in ()).throw(error), [1, 2])
    tried = []
    with pytest.raises(ValueError, match="else"):
        halving(lambda batch: tried.append(batch) or [][int("else")], [1, 2])
    assert tried == [[1, 2]]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_in_chunks_are_those_of_the_models_own_logits(kind, monkeypatch):
    model = tiny.model(kind)
    if kind == "gemma2":
        assert model.config.final_logit_softcapping  # capped logits are part of what is tested
    ids = torch.randint(3, tiny.VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = -model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(losses.forward_losses(model, ids), expected)
        monkeypatch.setattr(losses, "LOGITS", 10 * tiny.VOCAB)
        shapes, head = [], model.get_output_embeddings()
        handle = head.register_forward_hook(lambda _m, _i, out: shapes.append(out.numel()))
        torch.testing.assert_close(losses.forward_losses(model, ids), expected)
        handle.remove()
    assert len(shapes) == 5 and max(shapes) <= 10 * tiny.VOCAB


def short_of_memory(monkeypatch, model, rows):
    """Let every call of the model with more rows run out of memory; return the sizes asked for."""
    sizes, real = [], model.base_model.forward

    def forward(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > rows:
            raise torch.OutOfMemoryError("pretend")
        return real(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", forward)
    return sizes


def steered(at):
    vectors = torch.eye(tiny.D_MODEL)[:2]
    return torch.from_numpy(capability.steered_losses(at, ["one text", "two"], vectors, [0.0, 3.0], work=Work(8, progress=False)))


def means(at):
    return features.feature_means(at, ["one text", "two", "a third one", "four"])


def measured(at):
    scheme = effects.Scheme(prompts=("I think", "For now"), length=12, baseline_samples=1)
    vectors = torch.eye(tiny.D_MODEL)[:3]
    return effects.measure(at, vectors, torch.full((3,), 2.0), scheme=scheme, work=Work(progress=False)).effects


def judged(at):
    rows = [at.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("one text", "two", "a third one", "four")]
    return torch.cat([torch.from_numpy(row) for row in losses.token_losses(at.model, at.tokenizer, rows)])


@pytest.mark.parametrize("what", [steered, means, measured, judged], ids=lambda f: f.__name__)
def test_what_does_not_fit_is_halved_and_gives_the_same_numbers(what, monkeypatch):
    at = tiny.lab().at()
    whole = what(at)
    sizes = short_of_memory(monkeypatch, at.model, 2)
    torch.testing.assert_close(what(at), whole, atol=1e-4, rtol=1e-4)
    assert max(sizes) > 2


def test_steps_come_in_order_when_they_are_halved(monkeypatch):
    model = tiny.model("llama")
    ids = torch.tensor([[1, 5, 9, 7]])
    resid = features.residuals(model, ids, layers=[0])[0]
    short_of_memory(monkeypatch, model, 2)
    found = list(losses.steered_token_losses(model, ids, resid, torch.eye(tiny.D_MODEL)[:5], layer=0, batch_size=5))
    assert torch.cat([part for part, _ in found]).tolist() == [0, 1, 2, 3, 4]
