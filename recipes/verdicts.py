"""What changes the verdicts on SAE-TS and FGAA: every variant on every topic, and a table of differences: `python -m recipes.verdicts`."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from steerkit.concept import concepts
from steerkit.engine.lab import Place
from steerkit.features import feature_means, topic_features
from steerkit.files import DATA, write_atomic
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
    """Return what SAE-TS and FGAA choose among: vectors with lambda 1 alone, or with each lambda; FGAA always chooses n1.

    started: FGAA's filter of features that peak on the first token is on.
    """
    strengths, start = STRENGTHS if chosen else (1.0,), ", start left out" if started else ""
    of_fgaa = [f"FGAA of {n}{start}, {s:g} Mb, {share:g} of the map" for n in N1 for s in strengths]
    return {"SAE-TS": [f"SAE-TS, {s:g} Mb, {share:g} of the map" for s in strengths], "FGAA": of_fgaa}


def made(at: Place, effects: str, shares: list[float], kinds: list[str], penalties: list[float]) -> dict[str, list[SteeringVector]]:
    """Return each topic's vectors: CAA and the row ("plain"), and the variants for each share of the effects that the map is fitted on."""
    density, topics, out = quality.density(at, "data/own_text.jsonl.gz"), concepts(), {}
    starts = fgaa.peaks_at_start(at, (DATA / "check_texts.txt").read_text().splitlines())
    features = topic_features(at, topics, density).feature
    found, held, _, _ = published.measured(at, effects)
    x, y, how = found.vectors[~held], found.effects[~held], {"penalties": tuple(penalties)} if penalties else {}
    maps = {share: approximator.fit_ridge(x[: round(share * len(x))], y[: round(share * len(x))], **how)[0] for share in shares}
    for name, topic in topics.items():
        on, off = (feature_means(at, prompts).mean(0) for prompts in topic.contrast)
        out[name] = [caa(at, topic.contrast), sae_row(at, int(features[name]))] if "plain" in kinds else []
        for share, fitted in maps.items():
            aims = []
            if "SAE-TS" in kinds:
                aims += zip(variants(share, chosen=True)["SAE-TS"], [(int(features[name]), s) for s in STRENGTHS])
            for started in (started for started, kind in ((False, "FGAA"), (True, "started")) if kind in kinds):
                chosen, start = not started, starts if started else None
                wanted = [fgaa.target(on - off, density=density, n1=n, at_start=start) for n in N1]
                labels = variants(share, chosen=chosen, started=started)["FGAA"]
                aims += zip(labels, [(t, s) for t in wanted for s in (STRENGTHS if chosen else (1.0,))], strict=True)
            out[name] += [approximator.aim(fitted, at, t, strength=s, name=label) for label, (t, s) in aims]
    return out


def earlier_judges() -> Panel:
    """Return the offline judges with a judge of topics that learned from the contrast prompts, which also made the vectors."""
    swapped = {}
    for name, c in concepts().items():
        learned = {"judge_positive": c.positive_prompts, "judge_negative": c.negative_prompts}
        swapped[name] = replace(c, **learned, positive_prompts=c.judge_positive, negative_prompts=c.judge_negative)
    return replace(panel(), concept=lambda topic: concept_judge(swapped[topic], others=swapped))


def on_topic(judges: Panel, texts: pd.DataFrame) -> pd.DataFrame:
    """Return the texts with behaviour by other judges; coherence stays."""
    found = judges.score([(judges.concept(topic), part) for topic, part in texts.groupby("topic")])
    return texts.assign(behaviour=pd.concat(found))


def differences(ground: str, texts: pd.DataFrame, members: dict[str, list[str]]) -> Iterator[dict]:
    """Yield a row a pair of methods: held-out peak BCS of a minus b over topics, each method with the best of its members."""
    for name, names in members.items():
        texts = bcs.with_choice(texts, name, names)
    for a, b in PAIRS:
        i, by_topic = bcs.compare(texts, a, b)
        size = {"value": i.value, "low": i.low, "high": i.high, "n": i.n, "higher": int((by_topic > 0).sum())}
        yield {"ground": ground, "a": a, "b": b, **size}


def read(paths: list[Path]) -> pd.DataFrame:
    """Return the scores of several files, on the opening that all of them have; of a text that two files hold, the first counts."""
    scores = pd.concat(map(bcs.load_scores, paths), ignore_index=True).drop_duplicates(bcs.COLUMNS[:5])
    return scores[scores.prompt == "I think"]


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    write_atomic(path, frame.to_csv(index=False, float_format="%.4f"))


def texts(args: argparse.Namespace) -> None:
    """Steer every topic and write the judged texts."""
    spec = load.preset(args.preset)
    at = load.open(spec, layers=[spec.primary_layer], saes=args.saes, dtype="auto", check=not args.saes).at()
    vectors = made(at, args.effects, args.shares, args.kinds, args.penalties)
    protocol = bcs.Protocol(scales=SCALES, samples=args.samples)
    work = Work(args.batch_size, args.out.parent / (args.out.name + "-{key}.jsonl"))
    bcs.save_scores(bcs.sweep(at.lab, vectors, protocol=protocol, judges=panel(dtype="bfloat16"), work=work), args.out)


def table(args: argparse.Namespace) -> None:
    """Compare the sweeps, one change of ground after the other, on the opening that all of them have."""
    first, one, own, new = (read(paths) for paths in (args.first, [args.one], [args.own], args.new))
    own = pd.concat([own, one[one.method.isin(["CAA", "SAE row"])]], ignore_index=True)
    new = new.assign(method=new.method.replace("SAE-TS", "SAE-TS, lambda 1"))
    plain, chosen = variants(1.0, chosen=False, started=True), variants(1.0, chosen=True)
    all_new = {name: [m for m in new.method.unique() if m.startswith(name)] for name in chosen}
    grounds = [("as it was, nine topics", first, {}), ("+ features, 32 topics", on_topic(earlier_judges(), one), plain)]
    grounds += [("+ judges", on_topic(panel(), one), plain)]
    own = on_topic(panel(), own)
    grounds += [("+ map: a penalty for each feature", own, plain), ("+ lambda, filters", own, chosen), ("+ SAEs, rollouts", new, all_new)]
    grounds += [("the same, second judges", bcs.judged(new, panel("second"), Work(progress=False)), all_new)]
    write_csv(args.out, pd.DataFrame([row for ground in grounds for row in differences(*ground)]))


def gains(args: argparse.Namespace) -> None:
    """Write what SAE-TS gains over the decoder row with maps fitted on parts of the effects."""
    scores, rows = read(args.scores), []
    for share in args.shares:
        for name, members in (("SAE-TS", variants(share, chosen=False)), ("SAE-TS, lambda chosen", variants(share, chosen=True))):
            i, _ = bcs.compare(bcs.with_choice(scores, "aimed", members["SAE-TS"]), "aimed", "SAE row")
            rows.append([name, share, round(share * args.rollouts), i.value, i.low, i.high, i.n])
    write_csv(args.out, pd.DataFrame(rows, columns=["method", "share", "rollouts", "value", "low", "high", "n"]))


def main(argv: list[str] | None = None) -> None:
    """Read the command line and do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(required=True)
    add = {}
    for call in (texts, table, gains):
        one = parts.add_parser(call.__name__, help=call.__doc__)
        one.set_defaults(call=call)
        one.add_argument("--out", type=Path, required=True)
        add[call] = one.add_argument
    add[texts]("--preset", default="smollm2-135m")
    add[texts]("--saes", type=Path, help="folder of SAEs (layer_N) in place of the preset's")
    add[texts]("--effects", default="", help="effects to fit the map on, in place of the shipped ones")
    add[texts]("--shares", type=float, nargs="+", default=[1.0], help="parts of the effects that maps are fitted on")
    add[texts]("--kinds", nargs="+", default=["plain", "SAE-TS", "FGAA", "started"])
    add[texts]("--penalties", type=float, nargs="+", default=[], help="of the ridge fit; one of them is one for all features")
    add[texts]("--samples", type=int, default=16)
    add[texts]("--batch-size", type=int, default=256, help="rows decoded together")
    add[table]("--first", type=Path, nargs=2, required=True, help="scores of the notebooks 04 and 05 on the first ground")
    add[table]("--one", type=Path, required=True, help="texts on the first SAEs, one penalty for all features")
    add[table]("--own", type=Path, required=True, help="texts on the first SAEs, a penalty for each feature")
    add[table]("--new", type=Path, nargs=2, required=True, help="scores of the notebooks 04 and 05")
    add[gains]("--scores", type=Path, nargs="+", required=True, help="texts with shares, and with the plain vectors")
    add[gains]("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0])
    add[gains]("--rollouts", type=int, required=True, help="behind all of the effects")
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    main()
