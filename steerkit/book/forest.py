"""One page of intervals: a row for each claim of the ledger, a panel for each model."""

from itertools import groupby

from steerkit.book.ledger import NOT_RUN, Line, sentence

WORDS = """distance from no effect, in half widths of the interval
(shaded: the paper's side; small: cards beside the first;
two strokes: how far off a claim of no effect may be)"""
REACH = 6.0  # half widths that are drawn on each side
LOOK = {  # told apart by colour, and by marker, filled or hollow
    "same direction": {"color": "#2166AC", "marker": "o"},
    "opposite": {"color": "#B2182B", "marker": "D"},
    "undecided": {"color": "#595959", "marker": "s", "mfc": "white"},
    "not testable here": {"color": "#9A9A9A", "marker": "x"},
}


def scaled(line: Line) -> tuple[float, float, float]:
    """Return value, low and high in half widths of the interval, from no effect, with the paper's side on the right.

    What has no interval, none with a width, or no direction stays at no effect.
    """
    card, ours = line.card, line.card.ours if line.card else None
    if ours is None or not ours.high - ours.low > 0 or (not card.side and card.within is None):
        return (0.0, 0.0, 0.0)
    half, way = (ours.high - ours.low) / 2, card.side or 1
    value, *ends = (way * (x - card.null) / half for x in (ours.value, ours.low, ours.high))
    return (value, min(ends), max(ends))


def forest(columns: dict[str, list[Line]]):
    """Return the figure of one or more ledgers of the same claims, {name of the model: ledger}; its title counts the first one's verdicts.

    Large: a claim's first card; small: those beside it. Example: `forest({"smollm2-135m": lines(families(), shipped())})`
    """
    import matplotlib.pyplot as plt

    place, ticks, y = {}, [], 0.0
    for paper, part in groupby((line for line in next(iter(columns.values())) if line.first), key=lambda line: line.paper):
        ticks.append((y, paper, True))
        for line in part:
            y += 1
            place[line.claim.id] = y
            ticks.append((y, line.claim.says, False))
        y += 1.3
    fig, axes = plt.subplots(1, len(columns), figsize=(4.4 + 6.2 * len(columns), 0.235 * y + 1.1), sharey=True, squeeze=False)
    for ax, (model, ledger) in zip(axes[0], columns.items()):
        _column(ax, ledger, place)
        ax.set_title(model, fontsize=9, fontweight="normal")
        ax.set_xlabel(WORDS, fontsize=9)
    axes[0][0].set(ylim=(y - 0.6, -0.8), ylabel="claim, by paper")
    axes[0][0].set_yticks([at for at, *_ in ticks], [text for _, text, _ in ticks], fontsize=8)
    for label, (_, _, bold) in zip(axes[0][0].get_yticklabels(), ticks):
        label.set_fontweight("bold" if bold else "normal")
    title = sentence(next(iter(columns.values())))
    fig.suptitle(title[0].upper() + title[1:], x=0.01, ha="left", fontweight="bold", fontsize=11)
    handles = [plt.Line2D([], [], ls="", label=verdict, **look) for verdict, look in LOOK.items()]
    fig.legend(handles=handles, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0.0), fontsize=9)
    return fig


def _column(ax, ledger: list[Line], place: dict[str, float]) -> None:
    ax.axvspan(0, REACH + 0.4, color="#2166AC", alpha=0.07, lw=0)
    ax.axvline(0, color="black", lw=0.8)
    ax.set(xlim=(-REACH - 0.4, REACH + 0.4))
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(False, axis="y")
    beside: dict[str, int] = {}
    for line in ledger:
        at = place[line.claim.id]
        if line.first:
            changed = f" ({line.holm} after Holm)" if line.holm != line.verdict else ""
            words = f"{line.numbers} {line.claim.unit}; {line.n}{changed}" if line.n else line.verdict
            ax.text(1.015, at, words, transform=ax.get_yaxis_transform(), va="center", fontsize=7)
        else:
            beside[line.claim.id] = beside.get(line.claim.id, 0) + 1
            at += 0.18 * beside[line.claim.id]
        if line.verdict != NOT_RUN:
            _interval(ax, line, at)


def _interval(ax, line: Line, at: float) -> None:
    value, low, high = scaled(line)
    look, size = LOOK[line.verdict], 5.5 if line.first else 2.8
    edge = REACH - 0.5
    shown = max(-edge, min(edge, value))
    if shown == value:
        ax.plot([max(low, -REACH), min(high, REACH)], [at, at], color=look["color"], lw=1.4 if line.first else 0.7)
    else:  # it lies beyond the frame
        ax.annotate("", (shown + (0.8 if shown > 0 else -0.8), at), (shown, at), arrowprops={"arrowstyle": "->", "color": look["color"]})
    if line.card.within is not None and high > low:  # a claim of no effect: how far it may be off
        margin = line.card.within / ((line.card.ours.high - line.card.ours.low) / 2)
        ax.plot([x for x in (-margin, margin) if abs(x) <= REACH], [at] * (2 * (margin <= REACH)), "|", color="black", ms=9)
    ax.plot(shown, at, ls="", ms=size, **look)
