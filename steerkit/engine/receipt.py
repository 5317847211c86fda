"""The steering receipt: which tokens were changed, at which layer, and by how much."""

import html
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHADES = " .:-=+*#%@"


@dataclass
class Receipt:
    """What steering did, filled in by the hooks while they run.

    changed(row, layer) gives absolute positions, ratio(row, layer) the mean |delta| / |resid| over them. Positions count
    the real tokens of a row from 0; pads have none. In a notebook it shows a strip of tokens coloured by |delta| / |resid|;
    printed, the same as text. It is that of the last prompts that the context saw.
    """

    tokenizer: object = None
    tokens: list[dict[int, int]] = field(default_factory=list)  # row -> {position: token id}
    ratios: dict[int, list[dict[int, float]]] = field(default_factory=dict)  # layer -> row -> {position: |delta|/|resid|}
    n_pads: list[int] = field(default_factory=list)
    acted: bool = False  # whether any prompt of the context was changed anywhere
    _call: list = field(default_factory=list)
    _real: Tensor | None = None

    def open_call(self, ids, real: Bool[Tensor, "batch pos"], start: Int[Tensor, " batch"], *, fresh: bool = False) -> None:
        """Note the tokens that a forward call feeds; with `fresh` prompts the receipt starts anew."""
        if fresh or not self.tokens:
            self.tokens, self.ratios = [{} for _ in range(len(real))], {}
            self.n_pads = (~real).sum(1).tolist()
        if len(real) != len(self.tokens):
            raise ValueError(
                f"receipt: expected {len(self.tokens)} rows as in the prompt's call, got {len(real)}: open one context a batch"
            )
        position = (start[:, None] + real.long().cumsum(1) - 1).tolist()
        self._call, self._real = position, real
        ids = ids.tolist() if ids is not None else [[-1] * real.shape[1]] * len(real)
        for row, keep in enumerate(real.tolist()):
            self.tokens[row].update({p: t for p, t, k in zip(position[row], ids[row], keep) if k})

    def add(self, layer: int, before: Float[Tensor, "batch pos d_model"], after: Float[Tensor, "batch pos d_model"]) -> None:
        """Compare the residual stream before and after the edits of one layer."""
        position = self._call
        before, after = before.detach(), after.detach()
        ratio = (after.float() - before.float()).norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-30)
        if len(lost := (~torch.isfinite(ratio) & self._real.to(ratio.device)).any(1).nonzero()[:, 0].tolist()):
            raise ValueError(
                f"layer {layer}, rows {lost}: expected a finite residual stream, got NaN or infinity in {after.dtype}: "
                "lower the scale, or open the model in float32"
            )
        rows, ratios = self.ratios.setdefault(layer, [{} for _ in self.tokens]), ratio.tolist()
        for row, t in (after != before).any(-1).nonzero().tolist():
            rows[row][position[row][t]] = ratios[row][t]
            self.acted = True

    @property
    def layers(self) -> list[int]:
        """Layers at which something changed."""
        return sorted(layer for layer, rows in self.ratios.items() if any(rows))

    def changed(self, row: int = 0, layer: int | None = None) -> list[int]:
        """Return the absolute positions changed in a row, at one layer or at any."""
        layers = self.layers if layer is None else [layer]
        return sorted({p for at in layers for p in self.ratios.get(at, [{}] * (row + 1))[row]})

    def ratio(self, row: int = 0, layer: int | None = None) -> float:
        """Return the mean |delta| / |resid| over the changed positions of a row; 0.0 when nothing changed."""
        values = [r for at in (self.layers if layer is None else [layer]) for r in self.ratios[at][row].values()]
        return sum(values) / len(values) if values else 0.0

    def __len__(self) -> int:
        return len(self.tokens)

    def _strip(self, row: int) -> list[tuple[str, float, int]]:
        out = []
        for position, token in sorted(self.tokens[row].items()):
            text = self.tokenizer.decode([token]) if self.tokenizer is not None and token >= 0 else str(token)
            out.append((text, max((self.ratios[at][row].get(position, 0.0) for at in self.layers), default=0.0), position))
        return out

    def summary(self, row: int) -> str:
        """Return one line: how many positions of a row changed, where, and by how much."""
        n, total = len(self.changed(row)), len(self.tokens[row])
        if not n:
            return f"row {row}: nothing changed ({total} positions, {self.n_pads[row]} pads)"
        where = ", ".join(
            f"layer {at}: {len(self.changed(row, at))} x {self.ratio(row, at):.2f}" for at in self.layers if self.ratios[at][row]
        )
        return f"row {row}: {n} of {total} positions changed, {self.n_pads[row]} pads untouched; mean |delta|/|resid| by {where}"

    def __str__(self) -> str:
        lines = []
        for row in range(min(len(self), 8)):
            lines.append(self.summary(row))
            cells = self._strip(row)
            top = max((r for _, r, _ in cells), default=0.0) or 1.0
            lines.append(
                "  " + "".join(f"[{t!s}]{SHADES[min(9, round(9 * r / top))]}" if r else t for t, r, _ in cells).replace("\n", "\\n")
            )
        if len(self) > 8:
            lines.append(f"... and {len(self) - 8} more rows")
        return "\n".join(lines) or "receipt: no forward call yet"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = []
        for row in range(min(len(self), 8)):
            cells = self._strip(row)
            top = max((r for _, r, _ in cells), default=0.0) or 1.0
            spans = []
            for text, ratio, position in cells:
                shade = f"background:rgba(213,94,0,{0.15 + 0.75 * ratio / top:.2f})" if ratio else "color:#666"
                label = html.escape(text).replace("\n", "\u21b5") or "&nbsp;"
                title = f"position {position}: |delta|/|resid| = {ratio:.3f}"
                spans.append(f'<span title="{title}" style="{shade};white-space:pre-wrap;padding:1px 0;border-radius:2px">{label}</span>')
            parts.append(
                f'<div style="font-size:90%;margin-top:6px">{html.escape(self.summary(row))}</div>'
                f'<div style="font-family:monospace;line-height:1.7">{"".join(spans)}</div>'
            )
        if len(self) > 8:
            parts.append(f"<div>... and {len(self) - 8} more rows</div>")
        return "".join(parts) or "<div>receipt: no forward call yet</div>"


class Tally:
    """A receipt without the strip: per row, how many positions changed and their mean |delta| / |resid|."""

    def __init__(self, rows: int):
        self.count, self.total = torch.zeros(rows), torch.zeros(rows)

    def open_call(self, ids, real, start, *, fresh: bool = False) -> None:
        """Nothing to note: a tally keeps no tokens."""

    def add(self, layer: int, before: Float[Tensor, "batch pos d_model"], after: Float[Tensor, "batch pos d_model"]) -> None:
        """Count the changed positions of one layer and sum their |delta| / |resid|."""
        ratio = (after - before).float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-30)
        self.count = self.count.to(ratio.device) + (after != before).any(-1).sum(1)  # stays there: no wait for the device
        self.total = self.total.to(ratio.device) + ratio.sum(1)

    def select(self, index: Int[Tensor, " n"]) -> None:
        """Keep, drop or repeat rows."""
        self.count, self.total = (v[index.to(v.device)] for v in (self.count, self.total))
