"""Compare an SAE with the activations it is about to read, and record what was measured."""

import logging
import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.features import ordinary_positions, residuals
from steerkit.files import DATA, write_atomic
from steerkit.models.presets import SaeSet, presets

log = logging.getLogger(__name__)
FVU_SLACK, L0_SLACK = (0.02, 0.15), 0.15  # against recorded values: FVU absolute or relative, L0 relative
FVU_BOUND, L0_FACTOR = 0.5, 3.0  # where nothing is recorded


@torch.no_grad()
def quality(sae, x: Float[Tensor, "n d_model"]) -> dict[str, float]:
    r"""Return the fraction of variance unexplained and the mean number of active features per position.

    $\mathrm{FVU} = \sum_t \|x_t - \hat x_t\|^2 / \sum_t \|x_t - \bar x\|^2$.
    """
    x = x.float()
    acts = sae.encode(x)
    missed, total = (x - sae.decode(acts)).pow(2).sum(), (x - x.mean(0)).pow(2).sum()
    return {"fvu": float(missed / total), "l0": float((acts > 0).float().sum(-1).mean()), "positions": len(x)}


def measure(lab, saes: dict[int, object]) -> dict[int, dict[str, float]]:
    """Return `quality` per layer on the neutral texts of data/check_texts.txt."""
    ids, mask = lab.tokens((DATA / "check_texts.txt").read_text().splitlines())
    resid = residuals(lab.hf, ids, mask, layers=list(saes))
    spec, special = lab.preset, lab.tokenizer.all_special_ids
    return {
        layer: quality(
            sae,
            resid[layer][ordinary_positions(ids, mask, {layer: resid[layer]}, special=special, outlier=spec.outlier)],
        )
        for layer, sae in saes.items()
    }


def self_check(lab, saes: dict[int, object], chosen: SaeSet) -> list[dict]:
    """Return one row per SAE (layer, fvu, l0, positions, what was expected); ValueError when one does not fit.

    Against recorded values FVU may differ by 0.02 or 15 %, L0 by 15 %. Where nothing is recorded, FVU must stay below
    0.5 and L0 within a factor of 3 of the published one.
    """
    rows = []
    for layer, got in measure(lab, saes).items():
        if want := chosen.expect.get(layer):
            slack = max(FVU_SLACK[0], FVU_SLACK[1] * want["fvu"])
            fits = abs(got["fvu"] - want["fvu"]) <= slack and abs(got["l0"] - want["l0"]) <= L0_SLACK * want["l0"]
            expected = f"FVU {want['fvu']:.3f} +- {slack:.3f} and L0 {want['l0']:.1f} +- {L0_SLACK:.0%} (recorded)"
        else:
            l0 = chosen.published_l0(layer)
            fits = got["fvu"] < FVU_BOUND and (l0 is None or l0 / L0_FACTOR <= got["l0"] <= l0 * L0_FACTOR)
            near = f" and L0 within a factor {L0_FACTOR:g} of {l0:g} (published)" if l0 else ""
            expected = f"FVU below {FVU_BOUND}{near}"
        if not fits:
            raise ValueError(
                f"{lab.preset.name}, layer {layer}: the SAE does not fit the activations. Expected {expected}; got "
                f"FVU {got['fvu']:.3f} and L0 {got['l0']:.1f}. Probably it belongs to another layer, another model or "
                f"differently processed weights: check `{chosen.sae_id(layer)}` in data/models.yaml. After training it "
                f"anew, run `python -m recipes.checks {lab.preset.name}`. check=False opens it all the same."
            )
        rows.append({"layer": layer, **got, "expected": expected})
    return rows


def record(lab, set_name: str | None = None, *, path: Path = DATA / "models.yaml") -> dict[int, dict[str, float]]:
    """Measure every SAE of an open preset and write the `expect:` line of that set in the presets file; return it."""
    name, set_name = lab.preset.name, set_name or next(iter(lab.preset.saes))
    found = measure(lab, dict(lab.saes))
    expect = {layer: {"fvu": round(row["fvu"], 4), "l0": round(row["l0"], 2)} for layer, row in sorted(found.items())}
    line = ", ".join(f"{layer}: {{fvu: {row['fvu']}, l0: {row['l0']}}}" for layer, row in expect.items())
    head = rf"{re.escape(name)}:\n(?:(?:[ #].*)?\n)*?    {re.escape(set_name)}:.*\n(?:      .*\n)*?      expect: "
    entry = re.compile(rf"^({head}).*$", re.MULTILINE)
    text, count = entry.subn(lambda m: f"{m[1]}{{{line}}}", path.read_text())
    if count != 1:
        where = f"{path.name}, {name}.saes.{set_name}"
        raise ValueError(f"{where}: expected one line `expect:`, got {count}; add `expect: {{}}`")
    write_atomic(path, text)
    if presets(path)[name].saes[set_name].expect != expect:
        raise ValueError(f"{path.name}: expected {expect} under {name}.saes.{set_name} after writing; restore the file")
    log.info("%s.saes.%s.expect: {%s}", name, set_name, line)
    return expect
