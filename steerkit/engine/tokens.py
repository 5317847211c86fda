"""The tokens at a text's two ends: what it begins with, and what ends it."""

from collections.abc import Iterable

from torch import nn


def first_tokens(tokenizer) -> list[int]:
    """Return what every text begins with: the beginning-of-text token, or nothing where the tokenizer has none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def bare_ids(tokenizer, text: str) -> list[int]:
    """Return a text's token ids without the beginning-of-text token, also where the text itself starts with one."""
    ids, first = list(tokenizer(text, add_special_tokens=False)["input_ids"]), first_tokens(tokenizer)
    return ids[1:] if first and ids[:1] == first else ids


def text_ids(tokenizer, text: str) -> list[int]:
    """Return a text's token ids with the beginning-of-text token in front, once: a pasted chat template brings its own."""
    return first_tokens(tokenizer) + bare_ids(tokenizer, text)


def prompt_ids(tokenizer, prompt: str, *, chat: bool = False) -> list[int]:
    """Return a prompt's token ids: beginning-of-text token first, or the chat template with the assistant's turn opened.

    Raises ValueError for chat with a tokenizer that has no chat template.
    """
    if not chat:
        return text_ids(tokenizer, prompt)
    return _templated(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def stop_tokens(tokenizer, model: nn.Module | None = None) -> list[int]:
    """Return the tokens that end a text: the tokenizer's end and pad tokens, and those that the model's generation config names.

    There may be none. Chat models often name the end of a turn in the generation config only.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, Iterable) else [named]
    return sorted({int(i) for i in (tokenizer.eos_token_id, tokenizer.pad_token_id, *named) if i is not None})


def closing_tokens(tokenizer, model: nn.Module | None = None, *, chat: bool = False) -> list[int]:
    """Return the one token to put behind an answer that is learned: the one that ends the chat template's own answers, or the end token.

    Where the tokenizer has no end token, the model's; [] where there is none at all.
    """
    stops = stop_tokens(tokenizer, model)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ends = [i for i in reversed(_templated(tokenizer, turns)) if i in stops] if chat else []
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [i for i in stops if i != tokenizer.pad_token_id]
    return (ends or own)[:1]


def _templated(tokenizer, messages: list[dict], **settings) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("expected a tokenizer with a chat template, got none; use chat=False")
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)
