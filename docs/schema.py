"""Writes the JSON schemas of manifest.json and selftest.json into docs, from the types that read these files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from mvmoe_deploy import bundle, selftest
from mvmoe_deploy.bundle import FORMAT, READABLE, Manifest
from mvmoe_deploy.selftest import Selftest

FOLDER = Path(__file__).parent


def schemas() -> dict[Path, dict[str, Any]]:
    """The schemas (JSON Schema, draft 2020-12) by file, with a description of every field that has one."""
    manifest, test = _schema(Manifest, bundle, "manifest.json"), _schema(Selftest, selftest, "selftest.json")
    fields = manifest["$defs"]["Manifest"]["properties"]
    fields["format"]["const"] = FORMAT
    fields["version"]["enum"] = list(READABLE)
    return {FOLDER / "manifest.schema.json": manifest, FOLDER / "selftest.schema.json": test}


def _schema(kind: type, module: ModuleType, file: str) -> dict[str, Any]:
    """The schema of a type, described by the docstrings of the module's classes."""
    schema = msgspec.json.schema(kind)
    definitions = schema.pop("$defs")
    for name, definition in definitions.items():
        summary, attributes = _read_docstring(getattr(module, name).__doc__ or "")
        definition["description"] = summary
        for field, text in attributes.items():
            definition["properties"][field]["description"] = text
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{file} of a bundle of mvmoe-deploy",
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


def texts() -> dict[Path, str]:
    """The files' contents."""
    return {file: json.dumps(schema, indent=2, ensure_ascii=False) + "\n" for file, schema in schemas().items()}


if __name__ == "__main__":
    for file, text in texts().items():
        file.write_text(text, encoding="utf-8")
