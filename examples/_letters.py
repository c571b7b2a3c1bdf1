"""Letters as pictures of scikit-learn's digits are made, which no data set at hand has.

In: the fonts that come with matplotlib. Out: `(n, 64)` pixels from 0 to 1: each letter fills a
bitmap of 32x32, and a pixel is the share of ink in a block of 4x4, as in
https://archive.ics.uci.edu/dataset/80. Must not know about networks.
"""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "cmr10",
    "cmss10",
    "cmtt10",
)
LETTERS = "ACEFHJKMNPRTUVWXYadefhkmnprtuvwxy"
"""Not those that look like a digit: B, D, G, I, L, O, Q, S, Z and their like."""


def letters() -> np.ndarray:
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), 64) for name in FONTS]
    return np.stack([_draw(letter, font) for font in fonts for letter in LETTERS])


def _draw(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    paper = Image.new("L", (160, 160))
    ImageDraw.Draw(paper).text((40, 20), letter, 255, font)
    ink = paper.crop(paper.getbbox())
    scale = 32 / max(ink.size)
    ink = ink.resize([max(1, round(scale * length)) for length in ink.size])
    bitmap = Image.new("L", (32, 32))
    bitmap.paste(ink, tuple((32 - length) // 2 for length in ink.size))
    black = np.asarray(bitmap) > 127
    return black.reshape(8, 4, 8, 4).mean((1, 3), dtype=np.float32).ravel()
