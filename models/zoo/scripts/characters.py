"""The candidates: characters of the world's scripts, by Unicode ranges and, where a script has thousands, by frequency.

A candidate is one code point, so that every class has a Unicode name and needs no text shaping. Of Han characters and
Hangul syllables the common ones are taken: what the national standards put into their first levels.
"""

from __future__ import annotations

import hashlib
import unicodedata

RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x17F)),
    "greek": ((0x391, 0x3A9), (0x3B1, 0x3C9)),
    "cyrillic": ((0x400, 0x45F), (0x490, 0x493), (0x49A, 0x49B), (0x4A2, 0x4A3), (0x4AE, 0x4B1), (0x4D8, 0x4E9)),
    "armenian": ((0x531, 0x556), (0x561, 0x586)),
    "georgian": ((0x10D0, 0x10F0),),
    "hebrew": ((0x5D0, 0x5EA),),
    "arabic": ((0x621, 0x63A), (0x641, 0x64A), (0x679, 0x67E), (0x686, 0x6AF), (0x6BA, 0x6D3)),
    "devanagari": ((0x904, 0x939), (0x958, 0x961), (0x966, 0x96F)),
    "bengali": ((0x985, 0x9B9), (0x9DC, 0x9E1), (0x9E6, 0x9F1)),
    "gurmukhi": ((0xA05, 0xA39), (0xA59, 0xA5E), (0xA66, 0xA6F)),
    "gujarati": ((0xA85, 0xAB9), (0xAE6, 0xAEF)),
    "oriya": ((0xB05, 0xB39), (0xB5C, 0xB61), (0xB66, 0xB6F)),
    "tamil": ((0xB85, 0xBB9), (0xBE6, 0xBF2)),
    "telugu": ((0xC05, 0xC39), (0xC60, 0xC61), (0xC66, 0xC6F)),
    "kannada": ((0xC85, 0xCB9), (0xCE0, 0xCE1), (0xCE6, 0xCEF)),
    "malayalam": ((0xD05, 0xD39), (0xD60, 0xD61), (0xD66, 0xD6F), (0xD7A, 0xD7F)),
    "sinhala": ((0xD85, 0xDC6),),
    "thai": ((0xE01, 0xE2E), (0xE40, 0xE44), (0xE50, 0xE59)),
    "lao": ((0xE81, 0xEAE), (0xEC0, 0xEC4), (0xED0, 0xED9)),
    "tibetan": ((0xF20, 0xF29), (0xF40, 0xF6C)),
    "myanmar": ((0x1000, 0x102A), (0x1040, 0x1049)),
    "khmer": ((0x1780, 0x17B3), (0x17E0, 0x17E9)),
    "ethiopic": ((0x1200, 0x135A),),
    "kana": ((0x3041, 0x3096), (0x30A1, 0x30FA)),
    "bopomofo": ((0x3105, 0x3129),),
}
"""Code points of each script; of these the letters and digits."""

SYMBOLS = "!?&@#$%€£¥§¶†‡©®+=÷±<>{}[]()*~∑∫√∞≈≠≤≥∂∆∏Ω«»¿¢½¼¾→←↑↓↔♠♥♦♣♪№"
COMMON = {"han": 2800, "hangul": 1600}
"""How many of the scripts with thousands of characters are taken."""

SCRIPTS = (*RANGES, "symbol", "hangul", "han")


def candidates() -> dict[int, str]:
    """The script of every candidate code point. Within Han and Hangul, common characters come first."""
    found: dict[int, str] = {}
    for script, ranges in RANGES.items():
        for low, high in ranges:
            found.update({code: script for code in range(low, high + 1) if _is_letter_or_digit(code)})
    found.update({ord(character): "symbol" for character in SYMBOLS})
    found.update(dict.fromkeys(_hangul()[: COMMON["hangul"]], "hangul"))
    found.update(dict.fromkeys(_han()[: COMMON["han"]], "han"))
    return found


def name_of(code: int) -> str:
    """Unicode name in lower case, or ``han 8a9e`` where Unicode has only a number."""
    name = unicodedata.name(chr(code), f"U+{code:04X}")
    return name.replace("CJK UNIFIED IDEOGRAPH-", "HAN ").lower()


def _is_letter_or_digit(code: int) -> bool:
    return unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo", "Lt", "Nd", "No")


def _bytes(code: int, codec: str) -> bytes:
    try:
        return chr(code).encode(codec)
    except UnicodeEncodeError:
        return b""


def _hangul() -> list[int]:
    """The 2,350 syllables of KS X 1001, which are the common ones of 11,172, in a fixed random order."""
    return sorted((code for code in range(0xAC00, 0xD7A4) if len(_bytes(code, "euc_kr")) == 2), key=_scrambled)


def _han() -> list[int]:
    """Characters on the first level of at least two of GB 2312, Big5 and JIS X 0208; those on all three come first."""
    levels = {}
    for code in range(0x4E00, 0x9FA6):
        mainland, taiwan, japan = (_bytes(code, codec) for codec in ("gb2312", "big5", "shift_jis"))
        levels[code] = (
            (len(mainland) == 2 and 0xB0 <= mainland[0] <= 0xD7)
            + (len(taiwan) == 2 and 0xA440 <= int.from_bytes(taiwan) <= 0xC67E)
            + (len(japan) == 2 and 0x889F <= int.from_bytes(japan) <= 0x9872)
        )
    return sorted((code for code in levels if levels[code] >= 2), key=lambda code: (-levels[code], _scrambled(code)))


def _scrambled(code: int) -> bytes:
    return hashlib.md5(str(code).encode()).digest()
