"""Features of text: pooling, lens and contexts, each against a loop."""

import pytest
import tiny
import torch

from steerkit.features import feature_means, logit_lens, residuals, separating, token_batches, top_contexts

TEXTS = ["abc", "a longer text than the first", "q"]


def test_batches_keep_order_and_pad_on_the_right():
    tok = tiny.tokenizer()
    rows = [(i, m) for ids, mask in token_batches(tok, TEXTS, batch_size=2) for i, m in zip(ids, mask)]
    for (ids, mask), text in zip(rows, TEXTS):
        assert ids[mask.bool()].tolist() == [tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"]]
        assert not mask.flip(0).cummax(0).values.flip(0).ne(mask).any()  # no gap: ones, then zeros


def test_feature_means_encode_first_and_leave_the_first_token_out():
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    got = feature_means(model, tok, sae, TEXTS, layer=1, batch_size=2)
    for row, text in zip(got, TEXTS):
        ids = torch.tensor([[tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"]]])
        x = residuals(model, ids, layers=[1])[1][0, 1:].double()
        oracle = torch.relu(torch.cat([x, -x], 1)).mean(0)  # the planted SAE: one feature a sign and coordinate
        torch.testing.assert_close(row.double(), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gptneox"])
def test_logit_lens_is_the_head_of_the_normed_direction(kind):
    model, tok, v = tiny.model(kind), tiny.tokenizer(), torch.randn(tiny.D_MODEL)
    base = model.base_model
    norm = getattr(base, {"gpt2": "ln_f", "gptneox": "final_layer_norm"}.get(kind, "norm"))
    oracle = (model.get_output_embeddings()(norm(v[None]))[0]).topk(3)
    got = logit_lens(model, tok, v, k=3)
    assert [w for w, _ in got] == [tok.decode([i]) for i in oracle.indices.tolist()]
    assert [x for _, x in got] == pytest.approx(oracle.values.tolist(), rel=1e-5)


def test_top_contexts_find_planted_peaks_and_mark_the_edges():
    acts, tokens = torch.zeros(100, 2), torch.arange(100)
    acts[50, 0], acts[3, 0], acts[52, 0] = 5.0, 4.0, 3.0
    ids, peaks, places = top_contexts(acts, tokens, k=2, before=5, after=1)
    assert peaks[0].tolist() == [5.0, 4.0]
    assert places[0].tolist() == [50, 3]
    assert ids[0, 0].tolist() == [45, 46, 47, 48, 49, 50, 51]
    assert ids[0, 1].tolist() == [-1, -1, 0, 1, 2, 3, 4]


def test_a_layer_that_the_model_lacks_is_a_clear_error():
    with pytest.raises(ValueError, match="expected 0 to 2"):
        residuals(tiny.model("llama"), torch.ones(1, 3, dtype=torch.long), layers=[3])


def test_no_feature_is_chosen_by_means_that_are_not_numbers():
    positive = torch.tensor([[5.0, float("nan"), 1.0]])
    with pytest.raises(ValueError, match="feature means: expected finite numbers"):
        separating(positive, torch.zeros(1, 3), k=1)
    model = tiny.model("llama").half()
    with torch.no_grad():
        model.lm_head.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"directions: expected finite logits.*torch.float16"):
        logit_lens(model, tiny.tokenizer(), torch.ones(tiny.D_MODEL))
