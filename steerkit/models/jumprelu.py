"""The SAE of a folder in sae_lens's disk format, without sae_lens: for machines that hold only torch and transformers."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn


class JumpReLU(nn.Module):
    r"""$z = a \cdot [a > \theta]$ with $a = \mathrm{relu}((x - b_{dec}) W_{enc} + b_{enc})$; $\hat x = z W_{dec} + b_{dec}$.

    ValueError for a folder that holds another kind.
    """

    def __init__(self, folder: str | Path, device="cpu"):
        super().__init__()
        cfg, want = json.loads((Path(folder) / "cfg.json").read_text()), ("jumprelu", True, "none")
        got = tuple(cfg.get(key) for key in ("architecture", "apply_b_dec_to_input", "normalize_activations"))
        if got != want:
            raise ValueError(
                f"{folder}: expected architecture, apply_b_dec_to_input, normalize_activations {want}, got {got}: use sae_lens"
            )
        self.layer = int(cfg["metadata"]["hook_name"].split(".")[1])
        for name, value in load_file(Path(folder) / "sae_weights.safetensors", device=str(device)).items():
            self.register_buffer(name, value.float())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_sae"]:
        """Return the feature activations."""
        a = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        return a * (a > self.threshold)

    def decode(self, z: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_model"]:
        """Return the reconstruction."""
        return z @ self.W_dec + self.b_dec
