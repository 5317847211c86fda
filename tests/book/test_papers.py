"""Published numbers: averages, ratios and winners recompute, tables agree with each other, and each says where it comes from."""

import doctest
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import yaml

from steerkit.book import papers
from steerkit.book.papers import FOLDER, curves, table, trade_off
from steerkit.models.presets import presets

TOPICS = ["anger", "christian_evangelist", "conspiracy", "french", "london", "love", "praise", "want_to_die", "wedding"]
METHODS = ["CAA", "SAE row", "SAE-TS", "Pinverse", "Rotation", "FGAA"]
AXBENCH = ["Prompt", "LoReFT", "LoRA", "ReFT-r1", "DiffMean", "SAE row", "SAE-A"]
CORRSTEER = ["unsteered", "CorrSteer", "CorrSteer-S", "CorrSteer-P", "CorrSteer-A", "fine-tuning", "MI", "Fisher", "CAA"]
KNOWN = {"sae_ts": METHODS, "fgaa": METHODS, "output_score": AXBENCH, "corrsteer": CORRSTEER}
TASKS = ["mmlu", "mmlupro", "gsm8k", "bbq_ambig", "bbq_disambig", "harmbench", "xstest", "simpleqa"]
TABLES = [(path.stem, name) for path in sorted(FOLDER.glob("*.yaml")) for name in yaml.safe_load(path.read_text(encoding="utf-8"))]
MODELS = list(presets())
FIGURES = ["saets_fig3_2b", "saets_fig6_9b", "saets_fig7_surprisingly"]
PAPER = {
    "sae_ts": ("SAE-TS, arXiv 2411.02193v2, ",),
    "fgaa": ("FGAA, arXiv 2501.09929v3, ",),
    "output_score": ("output scores, arXiv 2505.20063, ", "AxBench, arXiv 2501.17148, ", "Wang et al., arXiv 2510.03659, "),
    "corrsteer": ("CorrSteer, arXiv 2508.12535, ",),
}
GOT = (
    r"printed( as labels in the figure)?$|printed, third party$|digitised, (about )?\+-[\d.]+|stated as ranges$|read by eye$|"
    r"read from figures|released data$|computed from (a third party's run|released data|the public code)|third party$"
)
AVERAGES = [
    ("sae_ts", "table_6", "gemma-2-2b", [0.2165, 0.1290, 0.3600, 0.1197, 0.3115]),
    ("sae_ts", "table_5", "gemma-2-9b", [0.2531, 0.2184, 0.3376]),
    ("fgaa", "table_1", "gemma-2-2b", [0.2201, 0.1404, 0.3650, 0.4702]),
    ("fgaa", "table_1", "gemma-2-9b", [0.2729, 0.2267, 0.3467, 0.3979]),
    ("fgaa", "table_d1", "gemma-2-2b", [0.2284, 0.1961, 0.8919]),
    ("fgaa", "table_d1", "gemma-2-9b", [0.2644, 0.2121, 0.9284]),
]


def wide(paper: str, name: str, model: str):
    """Return the last column of a table for one model, topics down and methods across, as printed."""
    frame = table(paper, name).query("model == @model")
    return frame.pivot(index="topic", columns="method", values=frame.columns[-1])[frame.method.unique()]


@pytest.mark.parametrize(("paper", "name"), TABLES)
def test_a_table_is_tidy_and_says_where_it_comes_from(paper, name):
    """Keys occur once, nothing is missing, names are the project's own, and the source is one line with a precision."""
    frame = table(paper, name)
    missing = ["ser_std", "neg_std"] if (paper, name) == ("corrsteer", "table_4") else []  # no +- is printed beside a count of 0
    assert len(frame) and not frame.drop(columns=missing).isna().any(axis=None)
    assert set(frame.dtypes.map(lambda kind: kind.kind)) <= set("ifOU")
    texts = {"model", "topic", "method", "about", "direction", "score", "selection", "high", "rubric", "task", "pooling", "sign", "control"}
    texts |= {"found_on", "tested_on", "decoding", "kind", "category"}
    for column in frame.columns:
        assert column in texts or frame[column].dtype.kind in "if", f"{column} holds text"
    assert set(frame.get("topic", [])) <= set(TOPICS) and set(frame.get("method", [])) <= set(KNOWN[paper])
    assert set(frame.get("task", [])) <= set(TASKS)
    assert set(frame.get("model", [])) <= {*MODELS, "qwen-2.5-3b"}
    source = frame.attrs["source"]
    assert source.startswith(PAPER[paper]) and re.search(GOT, source) and "\n" not in source
    if name.startswith(("table_", "fig_")):
        number = re.escape(name.split("_")[1])
        assert re.search(rf"(table|figure) {number}\b", source.lower().replace(".", ""))


@pytest.mark.parametrize(("paper", "name", "model", "printed"), AVERAGES)
def test_printed_averages_recompute(paper, name, model, printed):
    """The mean over nine topics is the printed average rounded to four decimals."""
    found = wide(paper, name, model)
    assert sorted(found.index) == TOPICS
    average = table(paper, name).attrs["average"]
    assert average.get(model, average) == dict(zip(found.columns, printed, strict=True))
    assert found.mean().to_numpy() == pytest.approx(printed, abs=5.1e-5)


@pytest.mark.parametrize(("figure", "name", "model"), [(FIGURES[0], "table_6", "gemma-2-2b"), (FIGURES[1], "table_5", "gemma-2-9b")])
def test_peaks_of_curves_are_the_printed_peaks(figure, name, model):
    """Digitised peaks and printed ones, both of four decimals, differ by at most one unit of the last."""
    peaks = curves(figure).groupby(["topic", "method"]).bcs.max().unstack()
    printed = wide("sae_ts", name, model)[["CAA", "SAE row", "SAE-TS"]]
    assert np.abs(peaks[printed.columns] - printed).to_numpy().max() < 1.5e-4


def test_peaks_of_figure_7_are_those_of_its_curves():
    """The table holds the highest point of each curve, to three decimals, and its scale."""
    found = curves(FIGURES[2])
    highest = found.loc[found.groupby(["topic", "method"]).bcs.idxmax()].set_index(["topic", "method"])
    listed = table("sae_ts", "fig_7_peaks").set_index(["topic", "method"]).loc[highest.index]
    assert (listed.scale == highest.scale).all()
    assert np.abs(listed.bcs - highest.bcs).max() < 5.1e-4


@pytest.mark.parametrize("figure", FIGURES)
def test_curves_are_complete(figure):
    """Nine topics, three methods and sixteen scales, each once, all from 0 to 1."""
    found = curves(figure)
    assert len(found) == 9 * 3 * 16 and not found.duplicated(["topic", "method", "scale"]).any()
    assert sorted(set(found.topic)) == TOPICS and list(dict.fromkeys(found.method)) == METHODS[:3]
    assert sorted(set(found.scale)) == list(range(0, 301, 20)) and found.bcs.between(0, 1).all()


def test_products_of_figure_8_are_the_curves_of_figure_3():
    """B x C of three decimals each against a curve of four: rounding explains 95 % of the points, the rest are within 0.0013."""
    both = trade_off().merge(curves(FIGURES[0]), on=["topic", "method", "scale"], validate="one_to_one")
    assert len(both) == len(trade_off()) == 367
    gap = np.abs(both.behaviour * both.coherence - both.bcs)
    rounding = 0.0005 * (both.behaviour + both.coherence) + 0.00015  # the last: one unit of the curve's last decimal, rounded
    assert (gap <= rounding).mean() > 0.95 and gap.max() < 0.0013


def test_figure_2_is_part_of_figure_8():
    """Two figures of one run of SAE-TS: the same behaviour and coherence, to three decimals."""
    mine = table("sae_ts", "fig_2").assign(method="SAE-TS")
    both = mine.merge(trade_off(), on=["topic", "method", "scale"])
    assert len(mine) == len(both) == 19
    assert np.abs(both[["behaviour_x", "coherence_x"]].to_numpy() - both[["behaviour_y", "coherence_y"]].to_numpy()).max() < 5e-4


@pytest.mark.parametrize(("name", "questions", "digit"), [("fig_5a", 195, 0.1), ("fig_5b", 420, 0.01)])
def test_accuracies_are_whole_answers(name, questions, digit):
    """Each accuracy is a whole number of answers, as far as half a digit of the reading (in percent) allows."""
    answers = table("fgaa", name).percent / 100 * questions
    assert np.abs(answers - answers.round()).max() <= digit / 2 / 100 * questions


@pytest.mark.parametrize(
    ("name", "chosen"), [("fig_a1", [8, 2, 4, 2, 5, 2, 8, 4, 2]), ("fig_a2", [1, 3, 2, 2, 7, 5, 8, 8, 3])], ids=["2b", "9b"]
)
def test_best_n1(name, chosen):
    """The sweep's best n1 of each topic, topics in alphabetical order."""
    sweep = table("fgaa", name).pivot(index="topic", columns="n1", values="bcs")
    assert sweep.index.tolist() == TOPICS and sweep.columns.tolist() == list(range(1, 9))
    assert sweep.idxmax(axis=1).tolist() == chosen


def test_who_wins():
    """SAE-TS leads CAA and the SAE row on 7 of 9 topics (2B); FGAA leads all on 8 of 9 (2B) and 4 of 9 (9B)."""
    first = wide("sae_ts", "table_6", "gemma-2-2b")[METHODS[:3]].idxmax(axis=1)
    assert first.index[first != "SAE-TS"].tolist() == ["christian_evangelist", "conspiracy"]
    small = wide("fgaa", "table_1", "gemma-2-2b").idxmax(axis=1)
    assert small.index[small != "FGAA"].tolist() == ["london"]
    large = wide("fgaa", "table_1", "gemma-2-9b").idxmax(axis=1)
    assert large.index[large == "FGAA"].tolist() == ["french", "london", "love", "praise"]


@pytest.mark.parametrize(("name", "model"), [("fig_2_fgaa", "gemma-2-2b"), ("fig_3_fgaa", "gemma-2-9b")])
def test_parts_of_fgaa_curves_reach_the_printed_peaks(name, model):
    """The highest point read is the printed peak within the reading's 0.02, at a scale that the figure's peaks allow."""
    found = table("fgaa", name)
    highest = found.loc[found.groupby("topic").bcs.idxmax()].set_index("topic")
    printed = wide("fgaa", "table_1", model).FGAA[highest.index]
    assert np.abs(highest.bcs - printed).max() <= 0.02
    scales = table("fgaa", name.replace("fgaa", "peak_scales")).query("method == 'FGAA'").set_index("topic").loc[highest.index]
    assert ((scales.scale_low <= highest.scale) & (highest.scale <= scales.scale_high)).all()


def test_largest_feature_differences_agree_with_the_printed_ones():
    """Figure A.3's highest bars against the first rows of Tables A.1 (Praise) and B.2 (Love)."""
    bars = table("fgaa", "fig_a3").set_index("topic").largest
    assert sorted(bars.index) == TOPICS
    for topic, name in (("praise", "table_a1"), ("love", "table_b2")):
        assert bars[topic] == pytest.approx(table("fgaa", name).value.max(), abs=0.1)


def test_golden_scores_are_whole():
    """The reference scores of features: four models, 285 features, every score that is there in [0, 1]."""
    golden = json.loads((FOLDER / "output_score_golden.json").read_text(encoding="utf-8"))
    features = [scores for model in golden.values() for scores in model["features"].values()]
    assert list(golden) == ["gemma2_2b", "gemma2_9b", "llama31_8b", "pythia_70m"] and len(features) == 285
    scores = [score for scores in features for key, score in scores.items() if key.startswith("S_") and score is not None]
    assert len(scores) > 285 and all(0 <= score <= 1 for score in scores)


def test_ratios_that_the_output_score_paper_reports():
    """The filter's gain over no filter (1.86, 1.21) and over AxBench's SAE rows (2.86, 3.36); 90.7 % of LoRA."""
    mine = table("output_score", "table_1").pivot(index="layer", columns="threshold", values="score")
    copied = table("output_score", "table_1_axbench").pivot(index="layer", columns="method", values="score")
    assert (mine[0.1] / mine[0]).round(2).tolist() == [1.86, 1.21]
    assert (mine[0.1] / copied["SAE row"]).round(2).tolist() == [2.86, 3.36]
    assert (mine.loc[20, 0.1] / copied.loc[20, ["LoRA", "ReFT-r1"]]).astype(float).round(3).tolist() == [0.907, 0.867]
    assert mine.loc[20].diff().lt(0).sum() == 1 and mine.loc[31].is_monotonic_increasing  # layer 20 falls once, from 0.001 to 0.01


def test_axbench_averages_and_copies():
    """Averages over four settings recompute, and Table 1 copies AxBench's Gemma-2-9B rows as they are."""
    found = table("output_score", "axbench")
    means = found.groupby("method").score.mean()
    assert {method: means[method] for method in means.index} == pytest.approx(found.attrs["average"], abs=5.1e-4)
    copied = table("output_score", "table_1_axbench").merge(found, on=["model", "layer", "method"], suffixes=("", "_axbench"))
    assert len(copied) == 10 and (copied.score == copied.score_axbench).all()


def test_best_factors_count_every_feature_once():
    """The counts of a model's grid add up to its features: 100 a layer, 1000 for AxBench."""
    layers = {"gemma-2-2b": 26, "gemma-2-9b": 42, "llama-3.1-8b": 32, "pythia-70m": 6, "gemma-2-9b-it": 10}
    found = table("output_score", "best_factors")
    assert found.groupby("model")["count"].sum().to_dict() == {model: 100 * n for model, n in layers.items()}
    assert found.query("model == 'gemma-2-9b-it' and factor >= 8")["count"].sum() == 365
    kept = table("output_score", "fraction_kept").drop_duplicates("model").set_index("model").features
    assert kept.to_dict() == {model: 100 * n for model, n in layers.items() if model != "gemma-2-9b-it"}


def test_fractions_fall_and_agree_with_counts():
    """A higher threshold keeps less; 589, 947, 15 and 22 features are the fractions printed; the late layers are a part of all."""
    kept = table("output_score", "fraction_kept")
    for _, one in kept.groupby("model"):
        assert one.threshold.is_monotonic_increasing and one.fraction.is_monotonic_decreasing
    fraction = kept.set_index(["model", "threshold"]).fraction
    prior = table("output_score", "prior").set_index("threshold").steered
    counts = {("gemma-2-2b", 0.1): prior[0.1], ("gemma-2-2b", 0.01): prior[0.01], ("gemma-2-2b", 0.9): 15, ("gemma-2-9b", 0.9): 22}
    for key, count in counts.items():
        assert fraction[key] == pytest.approx(count / {"gemma-2-2b": 2600, "gemma-2-9b": 4200}[key[0]], abs=5.1e-4)
    late = table("output_score", "late_layers").merge(kept, on=["model", "threshold"])
    assert len(late) == 4 and (late["count"] <= late.fraction * late.features_y + 0.5).all()
    assert (late.features_x - late["count"] <= (1 - late.fraction) * late.features_y + 2.1).all()


@pytest.mark.parametrize(("model", "scored", "unscored"), [("gemma-2-2b", 2400, 200), ("gemma-2-9b", 4100, 100)])
def test_co_occurrence_adds_up(model, scored, unscored):
    """Four kinds of features make all with both scores; those with a high output score are as many as `fraction_kept` allows."""
    found = table("output_score", "co_occurrence").query("model == @model").set_index("high")["count"]
    assert found.sum() == scored and found.idxmax() == "neither"
    kept = table("output_score", "fraction_kept").query("model == @model and threshold == 0.1").iloc[0]
    missing = kept.fraction * kept.features - found["both"] - found["output only"]  # in layers without input scores
    assert -0.5 * kept.features / 1000 <= missing <= unscored + 0.5 * kept.features / 1000


def test_medians_agree_with_counts_and_denominators():
    """More than half of a layer's 100 features pass a threshold exactly when the median does; medians of S_in are k/45 or between."""
    medians = table("output_score", "fig_3_medians")
    output = medians.query("score == 'S_out'").set_index(["model", "layer"]).value
    kept = table("output_score", "kept_by_layer")
    assert len(kept) == 4
    for row in kept.itertuples():
        assert (row.count > 50) == (output[row.model, row.layer] >= row.threshold)
    inner = medians.query("score == 'S_in'").value * 90
    assert np.abs(inner - inner.round()).max() <= 90 * 5.1e-4
    both = medians.query("model == 'gemma-2-2b'").pivot(index="layer", columns="score", values="value").dropna()
    assert (both["S_in"] <= both["S_in 75%"]).all() and len(both) == 14


def test_example_features_are_those_of_the_golden_scores():
    """Printed scores of single features are the stored ones to three decimals; one printed factor, of Llama, is another."""
    golden = json.loads((FOLDER / "output_score_golden.json").read_text(encoding="utf-8"))
    files = {"gemma-2-2b": "gemma2_2b", "pythia-70m": "pythia_70m", "llama-3.1-8b": "llama31_8b"}
    rows = [row for name in ("table_2", "table_3", "table_4") for row in table("output_score", name).itertuples()]
    others = []
    for row in rows:
        scores = golden[files[row.model]]["features"][f"{row.layer}_{row.feature}"]
        output = scores.get("S_out", scores.get("S_out_post"))
        assert (row.s_in, row.s_out) == pytest.approx((scores["S_in"], output), abs=5.1e-4)
        others += [(row.layer, row.feature, scores["best_factor"])] * (scores["best_factor"] != row.factor)
    assert len(rows) == 11 and others == [(2, 25580, 3.0)]
    whole = table("output_score", "table_5").s_in * 45
    assert np.abs(whole - whole.round()).max() <= 45 * 5.1e-4


def test_ratings_add_up():
    """5000 ratings a rubric but for two, and their mean is the mean of two layers; the two orders differ by 10 to 18 %."""
    found = table("output_score", "ratings").pivot(index="rating", columns="rubric", values="count")
    assert found.sum().to_dict() == {"fluency": 4998, "instruct": 5000}
    means = found.mul(found.index, axis=0).sum() / found.sum()
    layers = table("output_score", "mean_ratings")[["fluency", "instruct"]].mean()
    assert means.to_dict() == pytest.approx(layers.to_dict(), abs=6e-4)
    bounds = table("output_score", "aggregation")
    assert (bounds.harmonic_of_means / bounds.mean_of_harmonics).round(2).tolist() == [1.10, 1.18]


def ratio_fits(ser: float, neg: float, pos: float) -> bool:
    """Say whether a ratio of two decimals can be neg / (neg + pos), both counts rounded to whole numbers."""
    low = max(neg - 0.5, 0) / (max(neg - 0.5, 0) + pos + 0.5)
    return low - 0.0051 <= ser <= (neg + 0.5) / (neg + 0.5 + max(pos - 0.5, 0)) + 0.0051


def test_side_effect_ratios_of_corrsteer():
    """A mean of ratios is near the ratio of the means: 18 of 24 cells agree as far as rounding goes, all within three +-."""
    found = table("corrsteer", "table_4")
    assert len(found) == 24 and set(zip(found.task, found.method)) == {(t, f"CorrSteer-{v}") for t in TASKS for v in "SPA"}
    off = found[[not ratio_fits(row.ser, row.neg, row.pos) for row in found.itertuples()]]
    assert sorted(zip(off.task, off.method.str[-1])) == [
        ("bbq_ambig", "A"),
        ("gsm8k", "A"),
        ("gsm8k", "P"),
        ("harmbench", "P"),
        ("mmlu", "S"),
        ("simpleqa", "P"),
    ]
    spread = 3 * off.ser_std
    assert (np.abs(off.ser - off.neg / (off.neg + off.pos)) <= spread).all()


def test_side_effect_ratios_of_baselines():
    """Single runs: the ratio of the counts is the printed ratio, but for five cells; one of those has its counts swapped."""
    found = table("corrsteer", "table_4_baselines").set_index(["task", "method"])
    ratio = found.neg / (found.neg + found.pos)
    wrong = found.index[np.abs(ratio - found.ser) > 0.0051].tolist()
    assert len(found) == 27 and wrong == [
        ("mmlu", "Fisher"),
        ("mmlupro", "MI"),
        ("gsm8k", "Fisher"),
        ("bbq_ambig", "CAA"),
        ("bbq_disambig", "Fisher"),
    ]
    assert 1 - ratio["mmlu", "Fisher"] == pytest.approx(found.ser["mmlu", "Fisher"], abs=0.0051)
    gain = (found.pos - found.neg)["mmlu", "fine-tuning"] / 14042 * 100
    accuracy = table("corrsteer", "table_1").set_index(["task", "method"])["mean"]["mmlu"]
    assert gain == pytest.approx(accuracy["fine-tuning"] - accuracy["unsteered"], abs=0.1)


def test_splits_follow_the_rule():
    """70 % test, then 10 % validation of the rest, both rounded up, of data sets without splits of their own."""
    sizes = table("corrsteer", "splits").set_index("task")
    for task, total in (("bbq_ambig", 29246), ("bbq_disambig", 29246), ("harmbench", 400), ("xstest", 450), ("simpleqa", 4326)):
        test = -(-7 * total // 10)
        validation = -(-(total - test) // 10)
        assert sizes.loc[task].tolist() == [total - test - validation, validation, test]
    for task, train in (("mmlupro", 7847), ("gsm8k", 7473)):
        assert sizes.loc[task, ["pool", "validation"]].tolist() == [train - -(-train // 10), -(-train // 10)]


def single_runs():
    """Return the accuracies of CorrSteer's Tables 2 and 3, each once, with the number of test questions."""
    parts = [table("corrsteer", name).rename(columns={"tested_on": "task"}) for name in ("table_2", "table_3a", "table_3b")]
    found = pd.concat(parts)[["task", "accuracy"]].drop_duplicates()
    return found.merge(table("corrsteer", "splits")[["task", "test"]], on="task")


def test_percentages_are_whole_answers():
    """Accuracies of single runs are k/N to two decimals, but for one: no k/2135 is 31.00 %."""
    found = single_runs()
    answers = (found.accuracy / 100 * found.test).round()
    off = found[np.abs(answers / found.test * 100 - found.accuracy) > 0.0051]
    assert list(zip(off.task, off.accuracy)) == [("mmlupro", 31.0)]
    known = {("harmbench", 44.64): 125, ("harmbench", 67.5): 189, ("xstest", 86.35): 272, ("xstest", 87.3): 275, ("xstest", 53.65): 169}
    known |= {("simpleqa", 3.63): 110, ("simpleqa", 3.8): 115, ("mmlupro", 14.0): 299, ("mmlupro", 17.56): 375}
    counted = dict(zip(zip(found.task, found.accuracy), answers))
    assert {key: counted[key] for key in known} == known


def test_rates_of_refusal_are_whole_prompts():
    """The sweep counts 280 and 169 prompts, the categories those given beside them; they are all unsafe prompts and 131 safe ones."""
    sweep = table("corrsteer", "scale_sweep")
    llama = table("corrsteer", "llama_harmbench").percent
    kinds = table("corrsteer", "xstest_categories")
    rates = [*zip(sweep.harmbench, [280] * 5), *zip(sweep.xstest_safe, [169] * 5), *zip(llama, [280] * 2), *zip(kinds.percent, kinds.n)]
    for percent, n in rates:
        unit = 10.0 ** -len(str(float(percent)).partition(".")[2])
        assert abs(round(percent / 100 * n) / n * 100 - percent) <= 0.501 * unit, (percent, n)
    assert kinds.groupby("kind").n.sum().to_dict() == {"safe": 169 - 38, "unsafe": 146}
    refused = (kinds.percent / 100 * kinds.n).round().groupby(kinds.kind).sum()
    assert (131 - refused["safe"] + 38 + refused["unsafe"]) / 315 == pytest.approx(0.705, abs=5e-4)


def test_means_of_harmbench_are_not_those_of_five_runs():
    """Five runs of 280 give multiples of 1/1400: three methods have them, three have multiples of 1/560, one neither."""
    means = table("corrsteer", "table_1").query("task == 'harmbench'").set_index("method")["mean"]
    fits = {n: set(means.index[np.abs((means / 100 * n).round() / n * 100 - means) < 0.0051]) for n in (1400, 560)}
    assert fits == {1400: {"MI", "Fisher", "CAA"}, 560: {"unsteered", "CorrSteer-S", "CorrSteer-A"}}


def test_tables_of_corrsteer_agree_where_they_overlap():
    """The same single runs in Tables 2, 3a and 3b; one-token tasks pool alike; headline gains are differences of the tables."""
    transfer = table("corrsteer", "table_2")
    pooling = table("corrsteer", "table_3a").pivot(index="task", columns="pooling", values="accuracy")
    signs = table("corrsteer", "table_3b").pivot(index="task", columns="sign", values="accuracy")
    for row in transfer[transfer.found_on.isin(["none"]) | (transfer.found_on == transfer.tested_on)].itertuples():
        assert signs.loc[row.tested_on, "none" if row.found_on == "none" else "positive"] == row.accuracy
    free = [task for task in pooling.index if task != "mmlupro"]  # constrained decoding in 3a only
    assert (pooling.loc[free, ["none", "max"]].to_numpy() == signs.loc[free, ["none", "positive"]].to_numpy()).all()
    alike = pooling.index[pooling["max"] == pooling["mean"]]
    assert sorted(alike) == ["bbq_ambig", "bbq_disambig", "mmlu", "mmlupro"]
    gains = table("corrsteer", "headline_gains").set_index(["version", "task"]).points
    means = table("corrsteer", "table_1").set_index(["task", "method"])["mean"]
    for task in ("mmlu", "harmbench"):
        assert gains[1, task] == pytest.approx(signs.loc[task, "positive"] - signs.loc[task, "none"], abs=0.051)
        assert gains[2, task] == pytest.approx(means[task, "CorrSteer-A"] - means[task, "unsteered"], abs=0.061)


def test_class_balances_fit_the_splits():
    """No more samples than the pool and 4000; fewer positives than samples; two lists rest on fewer, as the notes say."""
    found = table("corrsteer", "class_balance")
    pool = table("corrsteer", "splits").set_index("task").pool
    assert len(found) == 15 and ((found.positives > 0) & (found.positives < found.n)).all()
    fewer = found[found.n != np.minimum(pool[found.task].to_numpy(), 4000)]
    assert list(zip(fewer.model, fewer.task, fewer.n)) == [("gemma-2-2b-it", "mmlu", 200), ("gemma-2-2b-it", "gsm8k", 1000)]
    rate = (found.positives / found.n * 100).groupby([found.model, found.task]).first()
    assert (rate["gemma-2-2b-it", "mmlu"], rate["llama-3.1-8b", "mmlu"]) == (66.0, 75.75)
    # within four standard errors of the unsteered accuracy of Table 1; not mmlu (other questions) and mmlupro (other decoding)
    tested = table("corrsteer", "table_1").query("method == 'unsteered'").set_index("task")["mean"]
    samples = found.query("model == 'gemma-2-2b-it'").set_index("task").n
    for task in set(TASKS) - {"mmlu", "mmlupro"}:
        error = 100 * math.sqrt(tested[task] / 100 * (1 - tested[task] / 100) / samples[task])
        assert abs(rate["gemma-2-2b-it", task] - tested[task]) < 4 * error


def one_hit(positives: int, n: int) -> float:
    """Return Pearson's r of a feature that fires on one sample only, which has outcome 1: sqrt((1 - p) / (p (n - 1)))."""
    share = positives / n
    return math.sqrt((1 - share) / (share * (n - 1)))


def test_rank_1_features_are_complete_and_possible():
    """One feature a layer from 1 up, ids within the SAE, coefficients above 0, and no correlation beyond what the labels allow."""
    found = table("corrsteer", "rank_1")
    balance = table("corrsteer", "class_balance").set_index(["model", "task"])
    for (model, task), one in found.groupby(["model", "task"], sort=False):
        layers, width = {"gemma-2-2b-it": (25, 16384), "llama-3.1-8b": (31, 32768)}[model]
        assert one.layer.tolist() == list(range(1, layers + 1)), (model, task)
        assert one.feature.between(0, width - 1).all() and (one.coefficient > 0).all() and one.r.between(0, 1).all()
    assert set(zip(found.model, found.task)) == set(balance.index)


@pytest.mark.parametrize(("model", "positives", "expected"), [("gemma-2-2b-it", 51, 0.136992797387935), ("llama-3.1-8b", 7, 0.376990754)])
def test_one_hit_is_the_least_correlation_of_simpleqa(model, positives, expected):
    """A feature firing once on a right answer has a known r, and no layer's best is below it (Llama's best is often just that)."""
    y = np.zeros(1167)
    y[:positives] = 1
    once = np.zeros(1167)
    once[0] = 3.7
    assert np.corrcoef(once, y)[0, 1] == pytest.approx(expected, abs=1e-9) == pytest.approx(one_hit(positives, 1167), abs=1e-9)
    counts = table("corrsteer", "class_balance").query("model == @model and task == 'simpleqa'")[["positives", "n"]]
    assert counts.to_numpy().tolist() == [[positives, 1167]]
    best = table("corrsteer", "rank_1").query("model == @model and task == 'simpleqa'").r
    assert best.min() >= round(expected, 4)
    assert (best == round(expected, 4)).sum() == {"gemma-2-2b-it": 0, "llama-3.1-8b": 9}[model]


def test_named_features_are_in_the_lists():
    """What the authors' text names is in their files, to three decimals; one feature is named that is not the first of its layer."""
    named = table("corrsteer", "named_features")
    both = named.merge(table("corrsteer", "rank_1"), on=["model", "task", "layer", "feature"], suffixes=("", "_listed"))
    absent = set(zip(named.layer, named.feature)) - set(zip(both.layer, both.feature))
    assert absent == {(19, 15745)} and np.abs(both.r - both.r_listed).max() < 6e-4
    best = table("corrsteer", "rank_1").query("model == 'gemma-2-2b-it'").groupby("task").r.idxmax()
    assert table("corrsteer", "rank_1").loc[best[["bbq_disambig", "bbq_ambig", "harmbench"]], "feature"].tolist() == [5137, 11021, 11722]


def test_the_sample_size_curve_ends_where_the_tables_are():
    """At 4000 samples all 25 layers are final and the accuracy is Table 3's; the curve stays within half a point of its median."""
    curve = table("corrsteer", "sample_size").set_index("samples")
    single = table("corrsteer", "table_3a").query("task == 'mmlu' and pooling == 'max'").accuracy.item()
    assert len(curve) == 24 and curve.loc[4000, ["accuracy", "final"]].tolist() == [single, 25]
    assert (curve.accuracy - curve.accuracy.median()).abs().drop(index=[40, 4000]).max() <= 0.5
    noise = 3.86 / math.sqrt(4000)  # expected largest of 16,384 correlations of noise
    largest = table("corrsteer", "sample_size_r").set_index("layer").r
    assert largest.index.tolist() == list(range(1, 26)) and largest.index[largest < noise].tolist() == [1, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (lambda: table("sae_ts", "table_2"), "table_6"),
        (lambda: table("reins", "table_1"), "fgaa"),
        (lambda: curves("saets_fig8_BC"), "saets_fig3_2b"),
    ],
)
def test_an_unknown_name_is_a_clear_error(call, known):
    """The message lists the names that are known."""
    with pytest.raises(ValueError, match=rf"expected one of \[.*'{known}'.*\], got"):
        call()


def test_examples_run():
    """The example in the docstring gives what it shows, and those in a line run."""
    assert doctest.testmod(papers).failed == 0
    assert curves("saets_fig3_2b").columns.tolist() == ["topic", "method", "scale", "bcs"]
    assert trade_off().query("topic == 'london'").columns.tolist() == ["topic", "method", "scale", "behaviour", "coherence"]
