"""The ledger: claims joined with cards, on planted cards whose verdicts are known by hand; and the list of claims beside the notebooks."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import cells
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import yaml
from matplotlib.colors import to_rgb

from steerkit.book import forest, ledger, papers, readme
from steerkit.book.cards import Card
from steerkit.book.claims import families
from steerkit.book.figures import check_figure, plain
from steerkit.files import write_atomic
from steerkit.stats import Interval

PROJECT = Path(__file__).resolve().parents[2]
UP, WEAK, DOWN, AROUND = (Interval(*x) for x in ((0.4, 0.3, 0.5, 9), (0.1, 0.005, 0.195, 9), (-0.4, -0.5, -0.3, 9), (0, -1, 1, 40, 7)))
WORDS = {"place": "Table 1", "test": "a minus b", "unit": "points", "over": "answers | seeds"}
CLAIMS = {
    "01_a": {
        "paper": "A",
        "claims": [
            {"id": "a.up", "says": "It rises", "card": "rises", "beside": {"lambda": "rises (lambda)"}, "readme": True} | WORDS,
            {"id": "a.down", "says": "It falls", "card": "falls"} | WORDS,
            {"id": "a.level", "says": "It is level", "card": "level at *", "readme": True} | WORDS,
            {"id": "a.ceiling", "says": "It is high", "card": "ceiling"} | WORDS,
            {"id": "a.open", "says": "It is open", "card": "open"} | WORDS,
            {"id": "a.alone", "says": "It has no interval", "card": "alone"} | WORDS,
        ],
    },
    "02_b": {
        "paper": "B",
        "claims": [
            {"id": "b.task", "says": "It helps", "card": "helps (*)"} | WORDS,
            {"id": "b.never", "says": "It flies", "card": "flies", "readme": True} | WORDS,
        ],
    },
}
SAID = {
    "01_a": [
        Card("rises", "0.2", WEAK, side=1),  # p = 0.04, the second largest of four: 0.08 after Holm
        Card("rises (lambda)", "0.2", UP, side=1),
        Card("falls", "-0.2", UP, side=-1),
        Card("level at 20", "0", Interval(0.01, -0.02, 0.04, 9), within=0.05),
        Card("ceiling", "up", UP, side=1, testable=False, note="at the ceiling"),
        Card("open", "up", AROUND, side=1),
        Card("alone", "up", Interval(0.4, nan, nan, 1), side=1),
    ],
    "02_b": [Card("helps (maths)", "0.1", DOWN, side=-1), Card("helps (law)", "0.1", AROUND, side=1)],
}
BY_HAND = [  # claim, what is different, verdict, after Holm, n
    ("a.up", "", "same direction", "undecided", "9 seeds"),
    ("a.up", "lambda", "same direction", "same direction", "9 seeds"),
    ("a.down", "", "opposite", "opposite", "9 seeds"),
    ("a.level", "20", "same direction", "same direction", "9 seeds"),
    ("a.ceiling", "", "not testable here", "not testable here", "9 seeds"),
    ("a.open", "", "undecided", "undecided", "40 answers in 7 groups"),
    ("a.alone", "", "not testable here", "not testable here", "1 seeds"),
    ("b.task", "maths", "same direction", "same direction", "9 seeds"),
    ("b.task", "law", "undecided", "undecided", "40 answers in 7 groups"),
    ("b.never", "", "not run", "not run", ""),
]


@pytest.fixture
def project(tmp_path):
    """A project folder with planted claims, runs of both notebooks, one that has not ended, and one without claims."""
    write_atomic(tmp_path / "data/claims.yaml", yaml.safe_dump(CLAIMS, sort_keys=False))
    every = SAID | {"03_unfinished": SAID["02_b"], "04_quiet": []}
    for name, cards in every.items():
        content = {"preset": "tiny", "cards": [plain(asdict(card)) for card in cards]}
        write_atomic(tmp_path / f"runs/laptop/{name}/cards.json", json.dumps(content))
        if name != "03_unfinished":
            write_atomic(tmp_path / f"runs/laptop/{name}/results.json", "{}")
    return tmp_path


def planted(project):
    return ledger.lines(families(project / "data/claims.yaml"), ledger.runs(project / "runs/laptop"))


# ---------------------------------------------------------------------------------------------------- planted cards
def test_verdicts_are_those_worked_out_by_hand(project):
    found = planted(project)
    assert [(x.claim.id, x.star or x.label, x.verdict, x.holm, x.n) for x in found] == BY_HAND
    assert [x.first for x in found] == [True, False, True, True, True, True, True, True, False, True], "claims are counted once"
    assert ledger.counts(found) == {"same direction": 3, "opposite": 1, "undecided": 1, "not testable here": 2}
    said = "of 7 claims, 3 come out the paper's way, 1 the other way, 1 undecided, 2 not testable here (1 more not run)"
    assert ledger.sentence(found) == said
    table = ledger.frame(found)
    assert table.claim[:2].tolist() == ["It rises", "It rises (lambda)"] and table.ours[0] == "0.10 [0.01, 0.20] points"
    assert table["could be seen"].tolist() == ["0.14", "0.14", "0.14", "", "", "1.4", "", "0.14", "1.4", ""]


def test_what_is_kept_gives_the_same_ledger_again_and_one_notebook_can_be_kept_alone(project):
    now = ledger.runs(project / "runs/laptop")
    assert list(now) == ["01_a", "02_b"]
    ledger.ship("laptop", ["01_a", "02_b", "04_quiet"], root=project)
    claims = families(project / "data/claims.yaml")
    assert ledger.frame(ledger.lines(claims, ledger.shipped(root=project))).equals(ledger.frame(ledger.lines(claims, now)))
    text = (project / "data/ledger/laptop.json").read_text()
    assert not [verdict for verdict in ledger.VERDICTS if verdict in text], "verdicts are worked out, never read"
    content = json.loads((project / "runs/laptop/02_b/cards.json").read_text())
    content["cards"][1]["ours"]["low"] = 0.5
    content["cards"][1]["ours"]["value"] = 0.7
    for name in ("01_a", "02_b"):
        write_atomic(project / f"runs/laptop/{name}/cards.json", json.dumps(content))
    ledger.ship("laptop", ["02_b"], root=project)
    after = [line.verdict for line in ledger.lines(claims, ledger.shipped(root=project))]
    assert after == [*(row[2] for row in BY_HAND[:8]), "same direction", "not run"]
    assert ledger.ship("laptop", ["04_quiet"], root=project) is None and ledger.shipped("full", root=project) == {}


def test_a_card_that_no_claim_names_or_two_do_is_found(project):
    claims, said = families(project / "data/claims.yaml"), ledger.runs(project / "runs/laptop")
    assert ledger.strays(claims, said) == []
    said["02_b"].cards["helps (a) and more"] = SAID["02_b"][0]
    said["02_b"].cards["flies"] = SAID["02_b"][0]
    said["05_new"] = ledger.Said("tiny", {"x": SAID["02_b"][0]})
    assert ledger.strays(claims, said) == ["02_b: helps (a) and more", "05_new: x"]
    claims["02_b"].claims[1].beside["again"] = "helps (*)"
    assert "02_b: helps (law)" in ledger.strays(claims, said)


def test_stars_stand_for_something_and_all_else_is_literal(project):
    claim = WORDS | {"id": "a", "says": "A", "card": "a [b] (*) at *"}
    write_atomic(project / "c.yaml", yaml.safe_dump({"01_a": {"paper": "A", "claims": [claim]}}))
    cards = {name: Card(name, "up", UP, side=1) for name in ("a [b] (x) at 20", "a b (x) at 20", "a [b] () at 20", "a [b] (x) at 20, more")}
    found = ledger.lines(families(project / "c.yaml"), {"01_a": ledger.Said("tiny", cards)})
    assert [line.star for line in found] == ["x, 20", "x, 20, more"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["01_a"]["claims"][0].update(number=0.2), "unknown key number; known keys: id, says"),
        (lambda c: c["01_a"]["claims"][0].pop("place"), "missing key place"),
        (lambda c: c["02_b"]["claims"][0].update(id="a.up"), "got a.up twice: rename one"),
        (lambda c: c["01_a"]["claims"][1].update(card="rises (lambda)"), r"got \('01_a', 'rises \(lambda\)'\) twice"),
    ],
)
def test_a_wrong_list_of_claims_is_refused(project, change, words):
    wrong = yaml.safe_load((project / "data/claims.yaml").read_text())
    change(wrong)
    write_atomic(project / "wrong.yaml", yaml.safe_dump(wrong))
    with pytest.raises(ValueError, match=words):
        families(project / "wrong.yaml")


OLD = {"claim": "c", "paper": "up", "ours": "0.1 [0.0, 0.2], n = 9"}


@pytest.mark.parametrize("old", [[OLD], {"preset": "tiny", "cards": [OLD]}])
def test_cards_without_numbers_are_refused(project, old):
    write_atomic(project / "runs/laptop/02_b/cards.json", json.dumps(old))
    with pytest.raises(ValueError, match=r"02_b/cards\.json: expected a preset and cards with their numbers.*run the notebook again"):
        ledger.runs(project / "runs/laptop")


# ---------------------------------------------------------------------------------------------------- the page
def test_intervals_are_drawn_from_no_effect_with_the_papers_side_on_the_right(project):
    found = planted(project)
    weak, level, up = (0.1 / 0.095, 0.005 / 0.095, 0.195 / 0.095), (1 / 3, -2 / 3, 4 / 3), (4, 3, 5)
    expected = [weak, up, (-4, -5, -3), level, up, (0, -1, 1), (0, 0, 0), up]
    np.testing.assert_allclose([forest.scaled(line) for line in found[:8]], expected)
    ratio = Interval(1.3, 1.2, 1.4, 9)
    others = [Card("c", "1.2", ratio, side=1, null=1.0), Card("c", "unclear", ratio, testable=False)]
    lines = [ledger.Line(found[0].claim, "A", "01_a", card=card) for card in others]
    np.testing.assert_allclose([forest.scaled(line) for line in lines], [(3, 2, 4), (0, 0, 0)])


def test_the_figure_shows_each_card_once_in_the_look_of_its_verdict(project):
    found = planted(project)
    fig = forest.forest({"tiny": found, "other": found})
    assert check_figure(fig, "claims") == "O" + ledger.sentence(found)[1:]
    for ax in fig.axes:
        for verdict, look in forest.LOOK.items():
            drawn = [line for line in ax.lines if line.get_marker() == look["marker"]]
            assert len(drawn) == sum(line.verdict == verdict for line in found), verdict
            assert {line.get_color() for line in drawn} <= {look["color"]}
        assert len([line for line in ax.lines if line.get_marker() == "|"]) == 1, "the margin of the one claim of no effect"
        after = [text.get_text() for text in ax.texts if "Holm" in text.get_text()]
        assert after == ["0.10 [0.01, 0.20] points; 9 seeds (undecided after Holm)"]
    labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    first = [claim["says"] for claim in CLAIMS["01_a"]["claims"]]
    assert labels == ["A", *first, "B", "It helps", "It flies"]
    plt.close(fig)


def test_what_lies_beyond_the_frame_is_an_arrow_inside_it(project):
    claims = families(project / "data/claims.yaml")
    far = {"rises": Card("rises", "up", Interval(50, 49, 51, 9), side=1), "falls": Card("falls", "up", Interval(50, 49, 51, 9), side=-1)}
    fig = forest.forest({"tiny": ledger.lines(claims, {"01_a": ledger.Said("tiny", far)})})
    low, high = fig.axes[0].get_xlim()
    where = [float(line.get_xdata()[0]) for line in fig.axes[0].lines if line.get_marker() in ("o", "D")]
    assert len(where) == 2 and all(low < x < high for x in where) and where[0] == -where[1] > 0
    plt.close(fig)


def test_verdicts_differ_in_marker_and_in_lightness_or_side():
    assert len({look["marker"] for look in forest.LOOK.values()}) == len(forest.LOOK)
    same, opposite = (np.array(to_rgb(forest.LOOK[v]["color"])) for v in ("same direction", "opposite"))
    assert same[2] - opposite[2] > 0.4, "blue against red: the pair that all kinds of colour blindness tell apart"


# ---------------------------------------------------------------------------------------------------- README
def test_the_table_is_written_between_its_marks_and_nowhere_else(project):
    ledger.ship("laptop", ["01_a", "02_b"], root=project)
    write_atomic(project / "README.md", f"Before\n{readme.BEGIN}\nold\n{readme.END}\nbehind\n")
    readme.main(["--root", str(project)])
    text = (project / "README.md").read_text()
    assert text.startswith(f"Before\n{readme.BEGIN}\n\nOn the model tiny: of 7 claims, 3 come") and text.endswith(f"{readme.END}\nbehind\n")
    assert [line for line in text.splitlines() if line.startswith("| It")] == [
        "| It rises | 0.2; A, Table 1 | 0.10 [0.01, 0.20] points; lambda: 0.40 [0.30, 0.50]; 9 seeds | "
        "same direction (undecided after Holm); lambda: same direction | [01](notebooks/01_a.ipynb) |",
        "| It is level (20) | 0; A, Table 1 | 0.01 [-0.02, 0.04] points; 9 seeds | same direction | [01](notebooks/01_a.ipynb) |",
        "| It flies | B, Table 1 | - | not run | [02](notebooks/02_b.ipynb) |",
    ]
    assert readme.page(project) == text


def test_a_page_without_marks_and_a_table_that_is_too_long_are_refused(project, monkeypatch):
    write_atomic(project / "README.md", f"{readme.END}\n{readme.BEGIN}\n")
    with pytest.raises(ValueError, match=r"expected a line `<!-- ledger -->` and a later line .* put them around the table"):
        readme.page(project)
    monkeypatch.setattr(readme, "MOST", 2)
    with pytest.raises(ValueError, match="expected at most 2 claims with `readme: true`, got 3"):
        readme.rows(planted(project))


# ------------------------------------------------------------------------------------ the list, the notebooks, what is shipped
class Table(HTMLParser):
    """The body of a table of claims, row by row."""

    def __init__(self, html):
        super().__init__()
        self.rows, self._open = [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.rows += [[]] if tag == "tr" else []
        self._open = tag == "td"
        if self._open:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._open = self._open and tag != "td"

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def printed(notebook):
    """The rows of the table of claims that a published notebook shows: claim, paper, ours, verdict, after Holm, ..."""
    for cell in nbformat.read(PROJECT / f"notebooks/{notebook}.ipynb", 4).cells:
        if cell.cell_type == "code" and cell.source.rstrip().endswith("book.claims()"):
            return [row for row in Table(cell.outputs[-1]["data"]["text/html"]).rows if row]
    return []


NOTEBOOKS = [path.stem for path in sorted((PROJECT / "notebooks").glob("*.ipynb")) if "book.claims()" in path.read_text()]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_ledger_says_what_the_published_notebook_says(notebook):
    """Every card that the page shows is named by one claim, and has the same numbers and verdicts in what is shipped."""
    claims, said = families(), ledger.shipped()
    mine = [line for line in ledger.lines(claims, said) if line.notebook == notebook and line.card]
    ours = {x.card.claim: [x.card.paper, str(x.card.ours or "-"), x.verdict, x.holm] for x in mine}
    assert ours == {row[0]: row[1:5] for row in printed(notebook)}, "call `make publish` after the notebooks have run"
    assert ledger.strays(claims, {notebook: said[notebook]}) == []


@pytest.mark.parametrize("notebook", families())
def test_each_claim_has_a_card_or_one_that_its_notebook_can_make(notebook):
    """A claim that needs a public benchmark has no card in what is shipped; the words of its card are in the notebook all the same."""
    source = "\n".join(cell.source for cell in nbformat.read(PROJECT / f"notebooks/{notebook}.ipynb", 4).cells)
    for line in (x for x in ledger.lines(families(), ledger.shipped()) if x.notebook == notebook and x.card is None):
        lacking = [word for word in re.findall(r"\w+", line.claim.card) if word not in source]
        assert not lacking, f"{line.claim.id}: no card, and the notebook makes none with {lacking}"


@pytest.mark.parametrize("claim", [claim for family in families().values() for claim in family.claims], ids=lambda claim: claim.id)
def test_each_source_is_a_table_of_the_paper(claim):
    if claim.source:
        assert len(papers.table(*claim.source.split("."))) > 0


def test_readme_and_ledger_agree():
    assert readme.page() == (PROJECT / "README.md").read_text(), "call `make readme`"
    table = [row for row in readme.rows(ledger.lines(families(), ledger.shipped())) if "](notebooks/" in row]
    assert 0 < len(table) <= 12
    assert all((PROJECT / re.search(r"\((notebooks/\w+\.ipynb)\)", row)[1]).exists() for row in table)


def test_the_notebook_draws_what_is_published_and_a_column_for_each_further_run(tmp_path, monkeypatch):
    """Before anything has run; and beside it a run of another model in which all of notebook 04 turns round."""
    plt.switch_backend("Agg")
    cards = [Card(**asdict(c) | {"ours": Interval(0.5 * -c.side, 0.4 * -c.side - 0.05, 0.4 * -c.side + 0.05, 9)}) for c in
        ledger.shipped()["04_sae_ts"].cards.values()]  # fmt: skip
    content = {"preset": "large", "cards": [plain(asdict(card)) for card in cards]}
    write_atomic(tmp_path / "large/04_sae_ts/cards.json", json.dumps(content))
    write_atomic(tmp_path / "large/04_sae_ts/results.json", "{}")
    given = {"runs": "", "more": [str(tmp_path / "large")], "results": "data/results"}
    given |= {"out_dir": str(tmp_path / "runs/09_ledger"), "figures_dir": str(tmp_path / "figures")}
    space = cells.run_cells(PROJECT / "notebooks/09_ledger.ipynb", given)
    assert space["preset"] == "smollm2-135m" and list(space["columns"])[:2] == ["smollm2-135m", "large"]
    turned = [line.verdict for line in space["columns"]["large"] if line.card]
    assert set(turned) <= {"opposite", "not testable here"} and len(turned) == len(cards)
    numbers = json.loads((tmp_path / "runs/09_ledger/results.json").read_text())
    counted = [numbers[f"claims: {verdict}"]["value"] for verdict in ledger.VERDICTS]
    assert counted == list(ledger.counts(ledger.lines(families(), ledger.shipped())).values())
    plt.close("all")
