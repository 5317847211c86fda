"""The two ends of a text: one token to begin with, and the tokens that end it, the same wherever text is read or written."""

import pytest
import tiny
import torch

from steerkit.engine.generate import Arm, Sampling, Work, generate
from steerkit.engine.tokens import bare_ids, closing_tokens, prompt_ids, stop_tokens, text_ids
from steerkit.features import token_batches
from steerkit.judges.coherence import split
from steerkit.methods.corrsteer import trial
from steerkit.methods.corrsteer.lora import lora
from steerkit.methods.output_scores import success
from steerkit.methods.sae_ts.calibration import calibration_rows
from steerkit.questions import Question, Task
from steerkit.scores import axbench, bcs

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def pasted(tok, text="Hi"):
    """A chat template's text, as one copies it into a prompt."""
    return tok.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)


def test_a_pasted_chat_template_begins_once():
    tok = tiny.tokenizer()
    text = pasted(tok)
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert text.startswith("<bos>") and ids[:1] == [tok.bos_token_id] and ids.count(tok.bos_token_id) == 1
    lab = tiny.lab(tok=tok)
    assert prompt_ids(tok, text) == text_ids(tok, text) == prompt_ids(tok, "Hi", chat=True) == ids
    assert lab.tokens([text])[0].tolist() == lab.tokens([text], bos=False)[0].tolist() == [ids]
    assert next(token_batches(tok, [text]))[0].tolist() == [ids]
    assert bare_ids(tok, text) == ids[1:] == split(tok, "so", text)[0][: len(ids) - 1]
    assert calibration_rows(tok, text, rows=1, length=9).tolist() == [ids[:9]]


def test_text_without_a_first_token_gets_none_where_the_tokenizer_has_none():
    tok = tiny.tokenizer(bos=False)
    ids = tok("abcdef", add_special_tokens=False)["input_ids"]
    assert text_ids(tok, "abcdef") == bare_ids(tok, "abcdef") == ids
    assert calibration_rows(tok, "abcdef", rows=2, length=3).tolist() == [ids[:3], ids[3:]]


@pytest.mark.parametrize(
    "named,expected", [(None, [0, 2]), (2, [0, 2]), ([2, 107], [0, 2, 107]), ((107,), [0, 2, 107]), (torch.tensor([9]), [0, 2, 9])]
)
def test_ends_are_the_tokenizers_and_the_generation_configs(named, expected):
    model = tiny.model("llama")
    model.generation_config.eos_token_id = named
    assert stop_tokens(tiny.tokenizer(), model) == expected


def endless():
    """A lab whose model and tokenizer name no end of a text."""
    lab = tiny.lab()
    model, tok = lab.hf, lab.tokenizer
    tok.eos_token = tok.pad_token = model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return lab


def question(prompt: str) -> Question:
    return Question("t", prompt, "g", prompt, "A")


@pytest.mark.parametrize("ends", [{0, 2, 107}, set()], ids=["two ends", "no end"])
def test_every_part_stops_at_the_models_own_end_token(monkeypatch, ends):
    """What each hands to the decode, with a model that names a second end token, and with one that names none."""
    seen = []

    class Enough(Exception):
        pass

    def watch(*args, sampling, **settings):
        seen.append(set(sampling.stop))
        raise Enough

    for module in (axbench, bcs, success, trial):
        monkeypatch.setattr(module, "generate", watch)
    monkeypatch.setattr(success, "period_tokens", lambda tok: [])
    lab, task = tiny.lab() if ends else endless(), Task("toy", "contains", 3, False, {})
    if ends:
        lab.hf.generation_config.eos_token_id = [2, 107]
    for call in (
        lambda: axbench.steer(lab, [Arm("a")], ["a"]),
        lambda: bcs.sweep(lab, {}),
        lambda: success.sweep(lab, {1: [0]}, {1: torch.tensor([[1]])}, prompts=["a"]),
        lambda: trial.ask(lab, task, [question("So")]),
    ):
        with pytest.raises(Enough):
            call()
    assert seen == [ends] * 4


def test_without_any_end_token_a_text_runs_to_its_length():
    lab = endless()
    five = Sampling(max_new_tokens=5, stop=stop_tokens(lab.tokenizer, lab.hf))
    frame = generate(lab, ["So", "Well then"], sampling=five, work=Work(progress=False))
    assert [len(t) for t in frame.tokens] == [5, 5]


def test_an_answer_is_learned_with_the_end_that_the_chat_template_puts_behind_it():
    """`~` ends a turn and is known to the generation config only, as end-of-turn tokens are."""
    model, tok = tiny.model("llama"), tiny.tokenizer()
    tok.chat_template, turn = TEMPLATE, tok("~", add_special_tokens=False)["input_ids"][0]
    assert closing_tokens(tok, model, chat=True) == closing_tokens(tok, model) == [tok.eos_token_id]
    model.generation_config.eos_token_id = [tok.eos_token_id, turn]
    assert closing_tokens(tok, model, chat=True) == [turn] and closing_tokens(tok, model) == [tok.eos_token_id]
    model, tok = (lab := endless()).hf, lab.tokenizer
    assert closing_tokens(tok, model) == closing_tokens(tok, model, chat=True) == []
    model.generation_config.eos_token_id = 9
    assert closing_tokens(tok, model) == [9]


def test_fine_tuning_teaches_a_model_to_end_its_turn():
    lab = tiny.lab()
    model, tok = lab.hf, lab.tokenizer
    tok.chat_template, turn = TEMPLATE, tok("~", add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [tok.eos_token_id, turn]
    asked = [question(p) for p in ("Which?", "Who?", "When?", "Where?")]
    greedy = Sampling(temperature=0.0, max_new_tokens=6, stop=stop_tokens(tok, model), keep_stop=True)
    with lora(lab, asked, chat=True, epochs=12, lr=3e-2, batch_size=4, rank=16) as tuned:
        frame = generate(tuned, [q.prompt for q in asked], sampling=greedy, chat=True, work=Work(progress=False))
    assert frame.text.tolist() == ["A~"] * 4
    with lora(endless(), asked, epochs=1):
        pass  # nothing to end with: the answer alone is learned
