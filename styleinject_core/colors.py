"""The colors of all pictures. Color-blind readers can tell them apart: Okabe and Ito, "Color Universal Design", 2008."""

from __future__ import annotations

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
)
STYLE_COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, "#9a9a9a")  # gray, where the palette has the text's black
INK, PAPER, FAINT, ALERT = "#1b1f24", "#ffffff", "#6b727c", "#b04a00"
FRAME, GRID, EMPTY, SHADE = "#c4c9cf", "#e3e6ea", "#d8dbe0", "#eceef1"
