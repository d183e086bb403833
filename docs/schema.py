"""Writes docs/manifest.schema.json: the JSON schema of a bundle's manifest, from the types that read it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from mvmoe_deploy import bundle
from mvmoe_deploy.bundle import FORMAT, READABLE, Manifest

FILE = Path(__file__).parent / "manifest.schema.json"


def manifest_schema() -> dict[str, Any]:
    """The schema (JSON Schema, draft 2020-12), with a description of every field that has one in its docstring."""
    schema = msgspec.json.schema(Manifest)
    definitions = schema.pop("$defs")
    for name, definition in definitions.items():
        summary, attributes = _read_docstring(getattr(bundle, name).__doc__ or "")
        definition["description"] = summary
        for field, text in attributes.items():
            definition["properties"][field]["description"] = text
    fields = definitions["Manifest"]["properties"]
    fields["format"]["const"] = FORMAT
    fields["version"]["enum"] = list(READABLE)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "manifest.json of a bundle of mvmoe-deploy",
        **schema,
        "$defs": dict(sorted(definitions.items())),
    }


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """A Google-style docstring's text before its sections, and its attributes, each on one line."""
    summary, _, section = text.partition("Attributes:\n")
    entries = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", section, re.MULTILINE | re.DOTALL)
    return _plain(summary), {name: _plain(value) for name, value in entries}


def _plain(text: str) -> str:
    """Without line breaks and without reStructuredText's marks."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text.replace("``", "`"))
    return " ".join(text.split())


def as_text() -> str:
    """The file's content."""
    return json.dumps(manifest_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_text(), encoding="utf-8")
