"""One colour a request, and a card to draw on that can be read on dark pages and on light ones.

A reader who has found request D in one picture should know it in the next, so the colour of a
request is a function of its number, and its letter is the one that `generate.py` prints:

    A blue  B orange  C green  D pink  E sky  F vermilion  G yellow  H indigo  ...  L purple

A picture in a README stands on white or on black, as its reader likes. No grey suits both: to be
4.5 times as bright or as dark as its ground, text on white needs a luminance of at most 0.183, and
on a dark page (#0d1117) of at least 0.200. So each figure brings its own ground, a card with round
corners. The same data give the same file: no date, no random ids, and text is drawn as paths,
whatever fonts a reader has. What a production engine does beyond this: it has designers.

Okabe and Ito 2008, "Color Universal Design" (the first seven colours), and Paul Tol's "muted"
scheme (the other five): told apart by the colour-blind; "contrast ratio" is that of WCAG 2.2.
Run: python -m plots.palette
Try: INK = "#8b949e" (a grey that looks fine on both pages: what does the demo say of it?).
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

CARD, INK, FAINT = "#f6f8fa", "#1f2328", "#59636e"  # ground, text, text of less weight
EMPTY, LIGHT = "#e1e5ea", "#b4bdc8"  # what is nobody's; a grey for areas
PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"]
PALETTE += ["#332288", "#999933", "#882255", "#44aa99", "#aa4499"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WIDTH = 9.0  # inches, of every card
STYLE = {
    "svg.fonttype": "path",
    "svg.hashsalt": "PagedGPT",  # ids inside the file are hashes, else salted at random
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def colour_of(request: str) -> str:
    """The colour of a request, the same in all pictures; after twelve they begin again."""
    return PALETTE[int(request) % len(PALETTE)]


def letter_of(request: str) -> str:
    """Its letter, as in the strip that `generate.py` prints; after 26 they begin again."""
    return LETTERS[int(request) % len(LETTERS)]


def contrast(one: str, other: str) -> float:
    """How many times as bright one of two colours "#rrggbb" is as the other, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def text_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, colour))


def card(height: float, title: str, words: str) -> Figure:
    """A figure of `height` inches: its point as a sentence, what to know about it, and room.

    The first axes may begin 1.0 inch below the upper edge.
    """
    figure = Figure(figsize=(WIDTH, height), facecolor="none")
    corners = {"boxstyle": "round,pad=0,rounding_size=0.12", "transform": figure.dpi_scale_trans}
    ground = FancyBboxPatch((0, 0), WIDTH, height, fc=CARD, ec="none", zorder=-1, **corners)
    figure.add_artist(ground)
    left = 0.3 / WIDTH
    figure.text(left, 1 - 0.22 / height, title, va="top", size=12.5, weight="bold")
    figure.text(left, 1 - 0.53 / height, words, va="top", color=FAINT, linespacing=1.35)
    return figure


def axes_on(
    figure: Figure, left: float, bottom: float, right: float, height: float, **more
) -> Axes:
    """Axes of a `height`, with margins from the card's left, lower and right edge, in inches."""
    total = figure.get_figheight()
    width = WIDTH - left - right
    return figure.add_axes([left / WIDTH, bottom / total, width / WIDTH, height / total], **more)


def save(draw: Callable[[], Figure], path: str | Path) -> None:
    """Draw in this file's style, whatever the user's settings are, and write the file.

    The name's end says the format: .svg, .png, or another that matplotlib knows. Raises
    ValueError for one that it does not know.
    """
    path = Path(path)
    if not path.suffix:  # matplotlib would add one, and write another file than was named
        raise ValueError("the name has no ending that says the format: .svg or .png, for example")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        draw().savefig(path, metadata=metadata, dpi=150)


# --------------------------------------------------------------------------------------------------
def demo():
    """Text on its card and letters on their colours; then why one grey does not do for both."""
    white, black = "#ffffff", "#0d1117"
    print(f"contrast of text on the card {CARD}; 4.5 is enough to read it")
    for name, colour in (("ink", INK), ("faint", FAINT)):
        print(f"  {name:6} {colour}  {contrast(colour, CARD):5.1f}")
    print("letters on the colours of the requests")
    for i in range(0, len(PALETTE), 4):
        cells = [
            f"{letter_of(str(n))} {colour} {contrast(text_on(colour), colour):5.1f}"
            for n, colour in enumerate(PALETTE[i : i + 4], i)
        ]
        print("  " + "     ".join(cells))
    greys = [f"#{level:02x}{level:02x}{level:02x}" for level in range(256)]
    best = max(greys, key=lambda grey: min(contrast(grey, white), contrast(grey, black)))
    both = contrast(best, white), contrast(best, black)
    print(f"the best grey for both pages, {best}: {both[0]:.2f} on white, {both[1]:.2f} on black")
    assert min(contrast(INK, CARD), contrast(FAINT, CARD)) >= 4.5 > min(both)
    assert all(contrast(text_on(colour), colour) >= 4.5 for colour in PALETTE)
    assert len(set(PALETTE)) == 12
    print("ok: every text can be read on its ground, and no grey could have done without one")


if __name__ == "__main__":
    demo()
