"""Published numbers: averages and winners recompute, figures agree with tables, and every table says where it comes from."""

import doctest
import json
import re

import numpy as np
import pytest
import yaml

from steerkit import papers
from steerkit.papers import FOLDER, curves, table, trade_off
from steerkit.tasks import concepts

TOPICS = list(concepts())
METHODS = ["CAA", "SAE row", "SAE-TS", "Pinverse", "Rotation", "FGAA"]
TABLES = [(path.stem, name) for path in sorted(FOLDER.glob("*.yaml")) for name in yaml.safe_load(path.read_text(encoding="utf-8"))]
FIGURES = ["saets_fig3_2b", "saets_fig6_9b", "saets_fig7_surprisingly"]
PAPER = {"sae_ts": "SAE-TS, arXiv 2411.02193v2, ", "fgaa": "FGAA, arXiv 2501.09929v3, "}
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
    assert len(frame) and not frame.isna().any(axis=None)
    keys = [c for c in ("model", "topic", "method", "n1", "scale", "steered", "feature", "direction") if c in frame]
    assert not frame.duplicated(keys).any()
    assert set(frame.get("topic", [])) <= set(TOPICS) and set(frame.get("method", [])) <= set(METHODS)
    assert set(frame.get("model", [])) <= {"gemma-2-2b", "gemma-2-9b"}
    source = frame.attrs["source"]
    number = re.escape(name.split("_")[1])
    assert source.startswith(PAPER[paper]) and re.search(rf"(table|figure) {number}\b", source.lower().replace(".", ""))
    assert re.search(r"printed( as labels in the figure)?$|digitised, (about )?\+-[\d.]+", source) and "\n" not in source


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


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (lambda: table("sae_ts", "table_2"), "table_6"),
        (lambda: table("corrsteer", "table_1"), "fgaa"),
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
