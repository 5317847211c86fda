"""README's table of what came out, made from the shipped ledger: `python -m steerkit.book.readme` writes it."""

import argparse
from pathlib import Path

from steerkit.book.claims import CLAIMS, families
from steerkit.book.ledger import Line, lines, presets, sentence, shipped
from steerkit.files import ROOT, write_atomic

BEGIN, END = "<!-- ledger -->", "<!-- end of ledger -->"
MOST = 12  # rows that a reader takes in


def rows(ledger: list[Line]) -> list[str]:
    """Return the table: a row for each claim with `readme: true`, its first card and, where there is one, the first beside it.

    Raises ValueError for more than `MOST` rows. Example: `rows(lines(families(), shipped()))`
    """
    table = ["| claim of a paper | its number | here | verdict | notebook |", "|---|---|---|---|---|"]
    first = [line for line in ledger if line.first and line.claim.readme]
    if len(first) > MOST:
        raise ValueError(f"expected at most {MOST} claims with `readme: true`, got {len(first)}: take the mark from some")
    for one in first:
        beside = [line for line in ledger if line.claim is one.claim and line.label][:1]
        number = (f"{one.card.paper}; " if one.card else "") + f"{one.paper}, {one.claim.place}"
        here = "; ".join([f"{one.numbers} {one.claim.unit}", *(f"{line.label}: {line.numbers}" for line in beside), one.n]).rstrip("; ")
        said = "; ".join([_verdict(one), *(f"{line.label}: {_verdict(line)}" for line in beside)])
        where = f"[{one.notebook.split('_')[0]}](notebooks/{one.notebook}.ipynb)"
        table.append(f"| {one.name} | {number} | {here if one.card else '-'} | {said} | {where} |")
    return table


def _verdict(line: Line) -> str:
    return line.verdict + (f" ({line.holm} after Holm)" if line.holm != line.verdict else "")


def page(root: Path = ROOT) -> str:
    """Return README.md with the table of the shipped ledger between its two marks. Raises ValueError where a mark is missing.

    Example: `page() == (ROOT / "README.md").read_text()` where nothing changed
    """
    text = (root / "README.md").read_text(encoding="utf-8")
    if (found := (text.count(BEGIN), text.count(END))) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md: expected a line `{BEGIN}` and a later line `{END}`, got {found} of them: put them around the table")
    said = shipped(root=root)
    ledger = lines(families(root / CLAIMS), said)
    block = [BEGIN, "", f"On the model {presets(said)}: {sentence(ledger)}.", "", *rows(ledger), "", END]
    return text[: text.index(BEGIN)] + "\n".join(block) + text[text.index(END) + len(END) :]


def main(argv: list[str] | None = None) -> None:
    """The command line: write the table into README.md."""
    parser = argparse.ArgumentParser(prog="python -m steerkit.book.readme", description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="project folder")
    root = parser.parse_args(argv).root
    write_atomic(root / "README.md", page(root))


if __name__ == "__main__":
    main()
