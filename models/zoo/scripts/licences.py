"""Which licence a Debian package's fonts have, read from its copyright file.

A copyright file is machine-readable ("DEP-5": stanzas of file patterns, each with a licence) or prose. Of a
machine-readable one, the stanza that names a font file decides; of prose, the licences that it mentions do, and prose
that mentions more than one is not understood.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

OPEN = ("OFL", "Apache-2.0", "Bitstream Vera", "IPA", "GPL with font exception", "permissive")
"""Licences whose fonts are used. ``permissive`` are MIT, BSD, CC0, the GUST font licence and the public domain."""

_RULES = (
    ("OFL", r"sil open font licen[cs]e|open font licen[cs]e|\bofl\b|ofl-1|sil-1\.1"),
    ("Apache-2.0", r"apache licen[cs]e|apache-2|\basl-2"),
    ("Bitstream Vera", r"bitstream.vera"),
    ("IPA", r"ipa font licen[cs]e|\bipa\b"),
    ("GPL with font exception", r"font.{0,12}exception|embed.{0,300}\s+not\s+by\s+itself"),
    ("permissive", r"\bcc0|public.domain|\bmit\b|expat|\bbsd\b|gust font|\bgfl\b|lppl"),
)
_FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".sfd", ".pfb", ".pfa", ".ufo", ".glyphs")


@dataclass(frozen=True)
class Stanza:
    """A paragraph of a machine-readable copyright file: file patterns and the licence they are under."""

    patterns: list[str]
    licence: str


def licence_of(copyright_text: str, font: str) -> str:
    """The licence of one font file: one of :data:`OPEN`, or the words of a file that says something else.

    Args:
        copyright_text: the package's ``copyright`` file.
        font: the font file's name, without folders.
    """
    stanzas = _stanzas(copyright_text)
    if not stanzas:
        return _of_prose(copyright_text)
    stem = Path(font).stem
    # Of stanzas that name the font the last one counts, as DEP-5 says. The package does not say which folder of the
    # source a font came from, so a stanza for a folder counts where that is named as a folder of fonts is.
    for matches in (_names, _is_font_folder, _is_all, _is_folder):
        decisive = [stanza for stanza in stanzas if any(matches(pattern, font, stem) for pattern in stanza.patterns)]
        if decisive:
            return _of_stanza(decisive[-1].licence)
    return "no stanza"


def _stanzas(text: str) -> list[Stanza]:
    """The stanzas that name files, with the full text of their licence, those on packaging left out."""
    if not re.search(r"^Format(-Specification)?:", text, re.M):
        return []
    paragraphs = [_fields(paragraph) for paragraph in re.split(r"\n\s*\n", text)]
    texts = {
        fields["license"].split("\n")[0].strip().lower(): fields["license"]
        for fields in paragraphs
        if "license" in fields and "files" not in fields
    }
    stanzas = []
    for fields in paragraphs:
        patterns = re.split(r"[\s,]+", fields.get("files", "").strip())
        if patterns == [""] or all(pattern.startswith("debian/") for pattern in patterns):
            continue
        licence = fields.get("license", "")
        name = licence.split("\n")[0].strip()
        whole = licence if "\n" in licence else "\n".join([licence, texts.get(name.lower(), "")])
        stanzas.append(Stanza(patterns, whole))
    return stanzas


def _fields(paragraph: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in paragraph.splitlines():
        match = re.match(r"([A-Za-z-]+):\s*(.*)", line)
        if match and not line[0].isspace():
            name = match[1].lower()
            fields[name] = match[2]
        elif name:
            fields[name] += "\n" + line.strip()
    return fields


def _names(pattern: str, font: str, stem: str) -> bool:
    """Patterns speak of the source package, where a font's name may end differently."""
    last = pattern.split("/")[-1]
    as_source = any(fnmatch(stem + suffix, last) for suffix in _FONT_SUFFIXES)
    return last not in ("", "*") and (fnmatch(font, last) or as_source)


def _is_all(pattern: str, _font: str, _stem: str) -> bool:
    return pattern in ("*", "./*")


def _is_font_folder(pattern: str, _font: str, _stem: str) -> bool:
    return bool(re.fullmatch(r"(\./)?(fonts?|sources?|src|ttf|otf|sfd)/\*?", pattern))


def _is_folder(pattern: str, _font: str, _stem: str) -> bool:
    return pattern.endswith(("/*", "/"))


def _of_stanza(licence: str) -> str:
    name, _, body = licence.partition("\n")
    name = name.strip()
    by_name = [label for label, rule in _RULES if re.search(rule, name, re.I)]
    if by_name:
        return by_name[0]
    if re.search(r"\b[AL]?GPL", name):  # the exception stands in the text
        exception = re.search(_RULES[4][1], body, re.I | re.S)
        return "GPL with font exception" if exception else name
    by_text = [label for label, rule in _RULES if re.search(rule, body, re.I)]
    return by_text[0] if len(by_text) == 1 else (name or "unclear")


def _of_prose(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    # what the packaging is under says nothing of the fonts
    text = re.sub(r"(the )?debian packaging.{0,400}", " ", text, flags=re.I)
    found = [label for label, rule in _RULES if re.search(rule, text, re.I)]
    gpl = re.search(r"\bGPL\b|general public licen[cs]e", text, re.I)
    if gpl and "GPL with font exception" not in found:
        return "GPL"
    if "GPL with font exception" in found:
        return "GPL with font exception"
    return found[0] if len(found) == 1 else "unclear"
