"""An open model, and one place in it: what every method of this book is given."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from steerkit.engine.steer import residual_blocks
from steerkit.engine.tokens import prompt_ids, stop_tokens, text_ids
from steerkit.inputs import Whole, strings, whole


@dataclass(frozen=True, eq=False)
class Lab:
    """An open model: `hf`, the causal LM; its tokenizer; its SAEs by layer; the preset, which holds name and conventions.

    checks: a row for each SAE that was compared with the activations it reads (`models.check.self_check`).

    Example: `lab = steerkit.open("smollm2-135m"); at = lab.at(13)`.
    """

    preset: object
    hf: nn.Module
    tokenizer: object
    saes: Mapping[int, object] = field(default_factory=dict)
    checks: list[dict] = field(default_factory=list)

    def at(self, layer: Whole = -1) -> "Place":
        """Return the place after block `layer` (0-based), by default the preset's own; ValueError for a layer the model lacks."""
        layer = self.preset.primary_layer if layer == -1 else whole("layer", layer)
        self.block(layer)
        return Place(self, layer)

    def sae(self, layer: int):
        """Return the SAE that reads the output of block `layer`; ValueError lists the layers that have one."""
        if layer not in self.saes:
            raise ValueError(f"{self.preset.name}: no SAE for layer {layer!r}; layers with an SAE: {list(self.saes)}")
        return self.saes[layer]

    def block(self, layer: int) -> nn.Module:
        """Return decoder block `layer` of `hf`; its output is `blocks.<layer>.hook_resid_post`."""
        blocks = residual_blocks(self.hf)
        if not 0 <= layer < len(blocks):
            raise ValueError(f"{self.preset.name}: expected a layer from 0 to {len(blocks) - 1}, got {layer}")
        return blocks[layer]

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text of this model (`tokens.stop_tokens`)."""
        return tuple(stop_tokens(self.tokenizer, self.hf))

    def tokens(
        self, texts: Iterable[str], *, chat: bool = False, bos: bool = True
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Return (input_ids, attention_mask), left padded, on the model's device.

        bos puts the preset's beginning-of-text token in front, once. chat wraps each text as a user turn in the model's chat
        template, which sets its own first token. ValueError for an empty row or a model without a chat template.

        Example: `ids, mask = lab.tokens(["I think", "Last night"])`.
        """
        tok, texts = self.tokenizer, strings("texts", texts)
        if chat and not tok.chat_template:
            raise ValueError(f"{self.preset.name}: expected a model with a chat template, got none; use chat=False")
        if chat:
            rows = [prompt_ids(tok, text, chat=True) for text in texts]
        else:
            rows = [text_ids(tok, text) if bos else list(tok(text, add_special_tokens=False)["input_ids"]) for text in texts]
        if not rows or not all(rows):
            raise ValueError("texts: expected at least one token in every row, got an empty one; add text or bos=True")
        width = max(map(len, rows))
        ids = torch.tensor([[tok.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.hf.device), mask.to(self.hf.device)


@dataclass(frozen=True, eq=False)
class Place:
    """One place in an open model: the residual stream after block `layer`, and the SAE that reads it."""

    lab: Lab
    layer: int

    @property
    def model(self) -> nn.Module:
        """The causal LM."""
        return self.lab.hf

    @property
    def tokenizer(self):
        """The model's tokenizer."""
        return self.lab.tokenizer

    @property
    def sae(self):
        """The SAE of this layer; ValueError where there is none."""
        return self.lab.sae(self.layer)

    @property
    def preset(self) -> str:
        """The preset's name."""
        return self.lab.preset.name

    @property
    def outlier(self) -> float:
        """Positions with a norm above this many times the median do not count (`features.ordinary_positions`)."""
        return self.lab.preset.outlier

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.lab.hf.get_input_embeddings().weight.shape[1]
