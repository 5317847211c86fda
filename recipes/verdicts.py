"""Steer all topics by every variant of SAE-TS and FGAA, and tell what changes their verdicts: `python -m recipes.verdicts`."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from steerkit.concept import Concept, concepts
from steerkit.engine.lab import Place
from steerkit.features import feature_means, topic_features
from steerkit.files import DATA
from steerkit.judges import Panel, panel
from steerkit.judges.concept import concept_judge
from steerkit.methods import fgaa
from steerkit.methods.sae_ts import approximator, published
from steerkit.models import load
from steerkit.scores import bcs
from steerkit.store import Work
from steerkit.training import quality
from steerkit.vectors import SteeringVector, caa, sae_row

SCALES = (0.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0, 100.0, 130.0, 160.0, 220.0)
N1, STRENGTHS = (2, 4, 8), (0.0, 0.5, 1.0)
PAIRS = (("SAE-TS", "CAA"), ("SAE-TS", "SAE row"), ("FGAA", "SAE-TS"), ("FGAA", "CAA"))


def variants(share: float, *, chosen: bool, started: bool = False) -> dict[str, list[str]]:
    """Return the names of the vectors that SAE-TS and FGAA may choose among: with lambda 1 only, or with each; n1 is always chosen."""
    strengths = STRENGTHS if chosen else (1.0,)
    start = ", start left out" if started else ""
    return {
        "SAE-TS": [f"SAE-TS, {s:g} Mb, {share:g} of the map" for s in strengths],
        "FGAA": [f"FGAA of {n}{start}, {s:g} Mb, {share:g} of the map" for n in N1 for s in strengths],
    }


def made(at: Place, topics: dict[str, Concept], effects: str, shares: list[float]) -> dict[str, list[SteeringVector]]:
    """Return each topic's vectors: CAA, the row, and the variants for each share of the effects that the map is fitted on."""
    density = quality.density(at, "data/own_text.jsonl.gz")
    starts = fgaa.peaks_at_start(at, (DATA / "check_texts.txt").read_text().splitlines())
    features = topic_features(at, topics, density).feature
    found, held, _, _ = published.measured(at, effects)
    x, y, out = found.vectors[~held], found.effects[~held], {}
    maps = {share: approximator.fit_ridge(x[: round(share * len(x))], y[: round(share * len(x))])[0] for share in shares}
    for name, topic in topics.items():
        on, off = (feature_means(at, prompts).mean(0) for prompts in topic.contrast)
        out[name] = [caa(at, topic.contrast), sae_row(at, int(features[name]))]
        for share, fitted in maps.items():
            for s, label in zip(STRENGTHS, variants(share, chosen=True)["SAE-TS"]):
                out[name].append(approximator.aim(fitted, at, int(features[name]), strength=s, name=label))
            wanted = {n: fgaa.target(on - off, density=density, n1=n) for n in N1}
            cut = {n: fgaa.target(on - off, density=density, n1=n, at_start=starts) for n in N1}
            aims = [(wanted[n], s) for n in N1 for s in STRENGTHS] + [(cut[n], 1.0) for n in N1]
            labels = variants(share, chosen=True)["FGAA"] + variants(share, chosen=False, started=True)["FGAA"]
            out[name] += [approximator.aim(fitted, at, t, strength=s, name=label) for (t, s), label in zip(aims, labels, strict=True)]
    return out


def earlier_judges() -> Panel:
    """Return the offline judges with a concept judge that learned from the contrast prompts, which also made the vectors."""
    swapped = {
        name: replace(
            c,
            judge_positive=c.positive_prompts,
            judge_negative=c.negative_prompts,
            positive_prompts=c.judge_positive,
            negative_prompts=c.judge_negative,
        )
        for name, c in concepts().items()
    }
    return replace(panel(), concept=lambda topic: concept_judge(swapped[topic], others=swapped))


def differences(ground: str, texts: pd.DataFrame, members: dict[str, list[str]]) -> Iterator[dict]:
    """Yield a row a pair of methods: held-out peak BCS of a minus b over topics, each method with the best of its members."""
    for name, names in members.items():
        texts = bcs.with_choice(texts, name, names)
    for a, b in PAIRS:
        i, by_topic = bcs.compare(texts, a, b)
        yield {
            "ground": ground,
            "a": a,
            "b": b,
            "value": i.value,
            "low": i.low,
            "high": i.high,
            "n": i.n,
            "higher": int((by_topic > 0).sum()),
        }


def main(argv: list[str] | None = None) -> None:
    """Read the command line and write one sweep's judged texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--saes", type=Path, help="folder of SAEs (layer_N) in place of the preset's")
    parser.add_argument("--effects", default="", help="effects to fit the map on, in place of the shipped ones")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="parts of the effects that maps are fitted on")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True, help="folder of scores.csv.gz")
    args = parser.parse_args(argv)
    spec = load.preset(args.preset)
    lab = load.open(spec, layers=[spec.primary_layer], saes=args.saes, dtype="auto", check=not args.saes)
    vectors = made(lab.at(spec.primary_layer), concepts(), args.effects, args.shares)
    protocol = bcs.Protocol(scales=SCALES, samples=args.samples)
    bcs.save_scores(bcs.sweep(lab, vectors, protocol=protocol, work=Work(256, args.out / "texts-{key}.jsonl")), args.out / "scores.csv.gz")


if __name__ == "__main__":
    main()
