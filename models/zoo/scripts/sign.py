"""A picture to read: a café's sign in nine scripts, drawn from fonts that no model was trained on."""

from __future__ import annotations

from pathlib import Path
from unicodedata import bidirectional

from PIL import Image, ImageDraw, ImageFont

from mvmoe_deploy.errors import DataError
from mvmoe_deploy.models.zoo.scripts.faces import font_files

LINES = (
    ("CAFE", "fonts-inter", "InterDisplay-Medium.otf"),
    ("ΚΑΦΕ", "fonts-croscore", "Arimo-Bold.ttf"),
    ("КАФЕ", "fonts-croscore", "Arimo-Bold.ttf"),
    ("კაფე", "fonts-dejavu-core", "DejaVuSerif.ttf"),
    ("קפה", "fonts-noto-core", "NotoSerifHebrew-Regular.ttf"),
    ("ካፌ", "fonts-sil-abyssinica", "AbyssinicaSIL-Regular.ttf"),
    ("喫茶", "fonts-noto-cjk", "NotoSerifCJK-Regular.ttc"),
    ("カフェ", "fonts-klee", "KleeOne-Regular.ttf"),
    ("카페", "fonts-nanum", "NanumMyeongjoBold.ttf"),
)
"""What each line says, the Debian package, and its font file.

All are test faces, under the SIL OFL but for DejaVu (Bitstream Vera).
"""

POINTS = 40
SPACING = 26
"""Between letters, in pixels: wider than the gaps within a character."""

LINE = 66
MARGIN = 34
GREEN, WHITE = (0, 96, 57), (255, 255, 255)


def in_view(text: str) -> str:
    """A line's characters from left to right as they stand on the sign; text is in the order of reading."""
    return text[::-1] if bidirectional(text[0]) in ("R", "AL") else text


def draw(root: Path | None = None) -> Image.Image:
    """Draws the sign.

    Args:
        root: folder with unpacked packages; None: the installed ones.

    Raises:
        DataError: packages are missing; the message names them.
    """
    files = {package: font_files(package, root) for _, package, _ in LINES}
    missing = sorted({package for _, package, file in LINES if file not in files[package]})
    if missing:
        raise DataError(f"{len(missing)} font packages are missing: apt-get install {' '.join(missing)}")
    rows = []
    for text, package, file in LINES:
        font = ImageFont.truetype(str(files[package][file]), POINTS, layout_engine=ImageFont.Layout.BASIC)
        rows.append([(each, font, font.getbbox(each, anchor="ls")) for each in in_view(text)])
    widths = [sum(int(box[2] - box[0]) for _, _, box in row) + SPACING * (len(row) - 1) for row in rows]
    sign = Image.new("RGB", (max(widths) + 2 * MARGIN, LINE * len(rows) + MARGIN), GREEN)
    pen = ImageDraw.Draw(sign)
    for number, (row, width) in enumerate(zip(rows, widths, strict=True)):
        x, baseline = (sign.width - width) // 2, MARGIN + LINE * number + 38
        for each, font, box in row:
            pen.text((x - box[0], baseline), each, font=font, fill=WHITE, anchor="ls")
            x += int(box[2] - box[0]) + SPACING
    return sign
