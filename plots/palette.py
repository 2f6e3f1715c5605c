"""One colour for each request, and a card to draw on that is readable on dark and on light pages.

A request has the same colour and the same letter in all pictures, so that a reader who has found
request D in one picture finds it in the next. The letter is the one that `generate.py` prints:

    A blue  B orange  C green  D pink  E sky  F vermilion  G yellow  H indigo  ...  L purple

A README is shown on a white or on a dark page. No grey text is readable on both: a contrast of 4.5
needs a luminance of at most 0.183 on white, and of at least 0.200 on a dark page (#0d1117). So each
figure brings its own background, a card with round corners.

The same data give the same file, byte by byte: it holds no date and no random ids, and text is
drawn as paths, which need no fonts. The tests compute the contrast of every text.

Okabe and Ito 2008, "Color Universal Design" (the first seven colours), and Paul Tol's "muted"
scheme (the other five): colour-blind readers can tell them apart. The contrast ratio is WCAG 2.2's.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

CARD = "#f6f8fa"  # the background of every picture
INK = "#1f2328"  # text
FAINT = "#59636e"  # less important text
EMPTY = "#e1e5ea"  # free blocks
LIGHT = "#b4bdc8"  # grey areas
PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"]
PALETTE += ["#332288", "#999933", "#882255", "#44aa99", "#aa4499"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WIDTH = 9.0  # inches, of every card
STYLE = {
    "svg.fonttype": "path",
    "svg.hashsalt": "PagedGPT",  # a fixed salt: ids in the file are hashes
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
    """The colour of a request, the same in all pictures. The 13th request has the first colour."""
    return PALETTE[int(request) % len(PALETTE)]


def letter_of(request: str) -> str:
    """The letter of a request, as `generate.py` prints it. The 27th request is A again."""
    return LETTERS[int(request) % len(LETTERS)]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours "#rrggbb", from 1 (equal) to 21 (black on white)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def text_on(colour: str) -> str:
    """Black or white: the one with more contrast to `colour`."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, colour))


def card(height: float, title: str, words: str) -> Figure:
    """A figure of `height` inches with a title (one sentence) and an explanation of two lines.

    The space for axes begins 1.0 inch below the upper edge.
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
    """Axes of a given height on a card. All lengths are inches; the first three are margins."""
    total = figure.get_figheight()
    width = WIDTH - left - right
    return figure.add_axes([left / WIDTH, bottom / total, width / WIDTH, height / total], **more)


def save(draw: Callable[[], Figure], path: str | Path) -> None:
    """Draw in this file's style, ignoring the user's matplotlib settings, and write the file.

    The file's ending sets the format: .svg, .png, or another one that matplotlib knows. Raises
    ValueError for an unknown ending.
    """
    path = Path(path)
    if not path.suffix:  # matplotlib would add one to the name
        raise ValueError("the name has no ending that says the format: .svg or .png, for example")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        draw().savefig(path, metadata=metadata, dpi=150)
