import base64
import io
import json
from dataclasses import asdict

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from steerkit.book import report
from steerkit.book.cards import verdict
from steerkit.book.report import METHOD_COLOURS, METHOD_MARKERS, Book, results_table
from steerkit.files import write_atomic
from steerkit.stats import Interval, t_interval


@pytest.fixture
def book(tmp_path):
    return Book("01_x", out_dir=tmp_path / "runs", figures_dir=tmp_path / "figures")


def drawn(title="Steering works", x="scale (residual units)", y="coherence (0 to 1)"):
    fig, ax = plt.subplots()
    ax.plot([0, 1, 2], [0.1, 0.3, 0.2])
    ax.set(title=title, xlabel=x, ylabel=y)
    return fig


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------------------------------------------- figures
def test_figure_is_saved_with_its_numbers_and_shown(book, tmp_path):
    frame = pd.DataFrame({"scale": [0, 1, 2], "coherence": [0.1, 0.3, np.nan], "method": "CAA"})
    shown = book.figure(drawn(), "sweep", frame, alt="A line that rises and falls")
    assert files(tmp_path / "figures" / "01_x") == ["sweep.csv", "sweep.png"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "figures/01_x/sweep.csv"), frame)
    png = (tmp_path / "figures/01_x/sweep.png").read_bytes()
    bundle, metadata = shown._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == png and Image.open(io.BytesIO(png)).format == "PNG"
    assert metadata["image/png"]["alt"] == "A line that rises and falls"
    assert str(tmp_path) not in str(bundle["text/plain"])
    assert not plt.get_fignums()  # closed: the inline backend must not show it a second time


def test_dict_data_becomes_json_without_nan(book, tmp_path):
    book.figure(drawn(), "f", {"x": np.arange(3), "y": [0.5, float("nan")], "best": Interval(1.0, 0.5, 1.5, 9), "label": "CAA"})
    kept = json.loads((tmp_path / "figures/01_x/f.json").read_text())
    assert kept["x"] == [0, 1, 2] and kept["y"] == [0.5, None] and kept["best"]["high"] == 1.5


def test_a_heavy_figure_is_made_light(book, tmp_path):
    fig, ax = plt.subplots(figsize=(5, 4))
    ax.imshow(np.random.default_rng(0).random((300, 400, 3)))
    ax.set(title="Noise", xlabel="x (px)", ylabel="y (px)")
    book.figure(fig, "heavy", {"n": [1]})
    assert (tmp_path / "figures/01_x/heavy.png").stat().st_size <= 200_000


@pytest.mark.parametrize(
    "fig, data, words",
    [
        (lambda: drawn(title=""), {"x": [1]}, "title"),
        (lambda: drawn(x=""), {"x": [1]}, "x axis"),
        (lambda: drawn(y=""), {"x": [1]}, "y axis"),
        (drawn, {"x": [float("nan")]}, "finite numbers, got none in x"),
        (drawn, pd.DataFrame({"a": [1.0], "b": [np.nan]}), "none in b"),
        (drawn, pd.DataFrame({"a": ["text"]}), "finite numbers"),
        (drawn, {}, "finite numbers"),
    ],
)
def test_a_figure_that_says_nothing_is_refused_and_nothing_is_written(book, tmp_path, fig, data, words):
    with pytest.raises(ValueError, match=words):
        book.figure(fig(), "f", data)
    assert files(tmp_path) == []
    plt.close("all")


def test_shared_labels_and_colour_bars_are_understood(book):
    fig, axes = plt.subplots(1, 2, sharey=True)
    for ax in axes:
        picture = ax.imshow(np.eye(3))
        ax.set_xlabel("layer")
    axes[0].set_ylabel("feature")
    fig.colorbar(picture, ax=axes)
    fig.suptitle("Two panels")
    book.figure(fig, "panels", {"x": [1]})


# ---------------------------------------------------------------------------------------------------- colours
def _seen(colour, matrix):
    """Simulate a colour as a dichromat sees it (Vienot, Brettel and Mollon 1999), in CIELAB-like coordinates."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    linear = np.clip(np.linalg.inv(to_lms) @ matrix @ to_lms @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(3),
        [[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]],
    ],
    ids=["normal", "protanopia", "deuteranopia"],
)
def test_methods_that_share_figures_are_told_apart_by_colour_blind_readers(matrix):
    names = ["baseline", "CAA", "SAE row", "SAE-TS", "FGAA", "CorrSteer", "output score"]
    seen = {name: _seen(METHOD_COLOURS[name], np.array(matrix)) for name in names}
    gaps = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a in names for b in names if a < b}
    assert min(gaps.values()) > 9, min(gaps, key=gaps.get)
    assert len(set(METHOD_MARKERS.values())) == len(METHOD_MARKERS)  # the marker tells them apart once more


def test_style_draws_in_the_palette():
    with plt.rc_context():
        report.style()
        assert plt.rcParams["axes.prop_cycle"].by_key()["color"][0] == pytest.approx(to_rgb(METHOD_COLOURS["CAA"]))


# ---------------------------------------------------------------------------------------------------- cards
UP, DOWN, AROUND = Interval(0.10, 0.05, 0.15, 90), Interval(-0.10, -0.15, -0.05, 90), Interval(0.05, -0.05, 0.15, 90)
NO_INTERVAL = Interval(0.36, float("nan"), float("nan"), 1)


@pytest.mark.parametrize(
    "ours, options, expected",
    [
        (UP, {"side": 0.36}, "same direction"),
        (DOWN, {"side": -0.01}, "same direction"),  # the paper's size plays no part
        (DOWN, {"side": 0.36}, "opposite"),
        (UP, {"side": -1}, "opposite"),
        (AROUND, {"side": 1}, "undecided"),
        (Interval(0.05, 0.0, 0.1, 9), {"side": 1}, "undecided"),
        (Interval(1.1, 1.05, 1.2, 90), {"side": 1, "null": 1.0}, "same direction"),
        (Interval(0.9, 0.85, 0.95, 90), {"side": 1, "null": 1.0}, "opposite"),
        (None, {"side": 1}, "not testable here"),
        (NO_INTERVAL, {"side": 1}, "not testable here"),
        (AROUND, {"side": 0, "within": 0.2}, "same direction"),  # a claim of no effect
        (AROUND, {"side": 0, "within": 0.1}, "undecided"),
        (UP, {"side": 0, "within": 0.02}, "opposite"),
        (DOWN, {"side": 0, "within": 0.02}, "opposite"),
        (UP, {"side": 0, "within": 0.12}, "undecided"),
    ],
)
def test_verdict_follows_the_rule(ours, options, expected):
    assert verdict(ours, **options) == expected


def test_a_verdict_agrees_with_the_sign_test_of_many_draws():
    """Under no effect the two directions come up one time in forty each; a true effect never turns into its opposite."""
    rng = np.random.default_rng(0)
    said = [verdict(t_interval(rng.normal(0, 1, 9)), side=1) for _ in range(2000)]
    assert 0.03 < np.mean([one != "undecided" for one in said]) < 0.07
    assert "opposite" not in {verdict(t_interval(rng.normal(2, 1, 9)), side=1) for _ in range(500)}


def test_a_claim_in_words_needs_a_side_and_one_of_no_effect_a_margin(book):
    with pytest.raises(ValueError, match="give side"):
        book.card("steering is sharp", paper="yes", ours=UP)
    with pytest.raises(ValueError, match="within"):
        book.card("MMLU stays level", paper=0.0, ours=UP)
    assert book.card("steering is sharp", paper="yes", ours=UP, side=1).verdict == "same direction"
    floor = book.card("coherence rises", paper=0.1, ours=UP, testable=False, note="unsteered coherence is 0.99")
    assert floor.verdict == "not testable here" and floor.p is None and "0.99" in str(floor)


def test_claims_of_one_notebook_are_corrected_together(book):
    weak = Interval(0.10, 0.005, 0.195, 90)  # p = 0.04
    for name, ours in {"a": UP, "b": weak, "c": AROUND, "d": None}.items():
        book.card(name, paper=0.2, ours=ours)
    table = book.claims().data
    assert table.verdict.tolist() == ["same direction", "same direction", "undecided", "not testable here"]
    assert table["after Holm"].tolist() == ["same direction", "undecided", "undecided", "not testable here"]
    assert table.ours.tolist()[0] == "0.10 [0.05, 0.15], n = 90" and table["could be seen"].tolist()[::3] == ["0.071", ""]


# ---------------------------------------------------------------------------------------------------- full runs
def test_a_full_run_is_shown_where_one_is_shipped_for_the_preset(tmp_path, capsys):
    live, shipped = pd.DataFrame({"x": [1, 2]}), pd.DataFrame({"x": range(1234)})
    for folder in ("01_x", "02_y"):
        write_atomic(tmp_path / f"results/tiny/{folder}/scores.csv", shipped.to_csv(index=False))
    places = {"out_dir": tmp_path / "runs", "figures_dir": tmp_path / "figures", "results": tmp_path / "results"}
    book = Book("01_x", **places, preset="tiny")
    pd.testing.assert_frame_equal(book.full("scores.csv", live), shipped)
    assert book.full("02_y/scores.csv", live, read=lambda path: path.read_text().split()) == ["x", *map(str, range(1234))]
    assert book.full("other.csv", live) is live and book.full("other.csv") is None
    assert Book("01_x", **places, preset="large").full("scores.csv", live) is live
    assert Book("01_x", **places | {"results": ""}, preset="tiny").full("scores.csv", live) is live
    stands_in = "no full run is shipped for these settings: this run stands in, 2 rows."
    assert capsys.readouterr().out.splitlines() == [
        "scores.csv: the shipped full run, 1,234 rows.",
        "02_y/scores.csv: the shipped full run, 1,235 rows.",
        f"other.csv: {stands_in}",
        "other.csv: no full run is shipped for these settings.",
        *[f"scores.csv: {stands_in}"] * 2,
    ]


def test_a_book_that_knows_no_preset_finds_no_full_run(book):
    assert book.full("layer_13.csv.gz", {}) == {}


# ------------------------------------------------------------------------------------------------ numbers, the end
def test_close_writes_results_and_names_no_path(book, tmp_path):
    said = book.metric("coherence", Interval(0.42, 0.38, 0.46, 90), unit="0 to 1")
    book.metric("speed", np.float32(350.0), n=1, unit="tokens/s")
    book.metric("one", Interval(0.5, float("nan"), float("nan"), 1))
    book.card("c", paper=0.4, ours=Interval(0.42, 0.38, 0.46, 90))
    shown = book.close(parameters={"seed": 3, "layer": 13, "preset": "tiny"})
    kept = json.loads((tmp_path / "runs/results.json").read_text())
    assert kept["coherence"] == {"value": 0.42, "low": 0.38, "high": 0.46, "n": 90, "unit": "0 to 1"}
    assert kept["speed"]["low"] is None and kept["one"]["high"] is None and "0.42" in said
    cards = json.loads((tmp_path / "runs/cards.json").read_text())
    ours = {"value": 0.42, "low": 0.38, "high": 0.46, "n": 90, "groups": None, "df": None}
    kept = {"claim": "c", "paper": "0.4", "ours": ours, "side": 1, "null": 0.0, "within": None, "testable": True, "note": ""}
    assert cards == {"preset": "tiny", "cards": [kept]}, "the numbers, and no verdict that a reader could take for granted"
    assert files(tmp_path / "runs") == ["cards.json", "results.json"]
    for text in (str(shown), shown._repr_html_()):
        assert "torch" in text and "GB" in text and "layer" in text and str(tmp_path) not in text
    assert shown.facts["seed"] == "3"


@pytest.mark.parametrize(
    "value, options, words",
    [
        (float("nan"), {"n": 3}, "finite"),
        (1.0, {}, "samples"),
        (1.0, {"n": 0}, "samples"),
        (1.0, {"n": 3, "low": 2, "high": 1}, "low <= high"),
    ],
)
def test_a_number_without_what_it_needs_is_refused(book, value, options, words):
    with pytest.raises(ValueError, match=words):
        book.metric("m", value, **options)
    assert book.metrics == {}


def test_results_table(tmp_path):
    for name, status in (("01_a", "done"), ("02_b", "failed")):
        (tmp_path / name).mkdir()
        record = {"status": status, "seconds": 61.2}
        if status == "failed":
            record["error"] = {"cell": 3, "of": 9, "line": "x = 1 / 0", "what": "ZeroDivisionError: division by zero"}
        (tmp_path / name / "status.json").write_text(json.dumps(record))
    metrics = {f"m{i}": {"value": i / 4, "low": 0.1, "high": 0.9, "n": 5, "unit": ""} for i in range(4)}
    (tmp_path / "01_a" / "results.json").write_text(json.dumps(metrics))
    text = results_table(tmp_path)
    assert "m1 0.25 [0.1, 0.9] (n = 5)" in text and "m3" not in text and "61 s" in text
    assert "cell 3/9: x = 1 / 0" in text and "ZeroDivisionError" in text
    markdown = results_table(tmp_path, states={"01_a": "done", "03_c": "not run yet"}, fmt="github")
    assert markdown.startswith("| notebook") and "not run yet" in markdown and "02_b" not in markdown


def test_interval_and_row_are_plain_data():
    assert asdict(Interval(1.0, 0.0, 2.0, 3)) == {"value": 1.0, "low": 0.0, "high": 2.0, "n": 3, "groups": None, "df": None}
