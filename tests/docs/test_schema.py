"""The manifest's JSON schema: current, and of what is written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from mvmoe_deploy.bundle import Manifest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """``docs/schema.py``."""
    spec = importlib.util.spec_from_file_location("schema", DOCS / "schema.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """As published."""
    return json.loads((DOCS / "manifest.schema.json").read_text(encoding="utf-8"))


def test_the_files_are_current(generator: ModuleType) -> None:
    texts = generator.texts()
    assert [file.name for file in texts] == ["manifest.schema.json", "selftest.schema.json"]
    for file, text in texts.items():
        stale = f"docs/{file.name} is stale: make schema, and say in docs/bundle-format.md what changed"
        assert text == file.read_text(encoding="utf-8"), stale


def test_selftests_fit_theirs(bundle_path: Path, dense_path: Path) -> None:
    import jsonschema

    schema = json.loads((DOCS / "selftest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert all("description" in field for field in schema["$defs"]["Case"]["properties"].values())
    for path in (bundle_path, dense_path):
        content = json.loads((path / "selftest.json").read_text())
        validator.validate(content)
        for wrong in ({"surprise": 1}, {"cases": []}, {"tolerance": {"gate": 0, "logits": 1}}):
            assert not validator.is_valid({**content, **wrong}), wrong
        content["cases"][0].pop("pixels")
        assert not validator.is_valid(content)


def test_every_documented_field_is_described(schema: dict[str, Any]) -> None:
    described = {name for name, field in schema["$defs"]["Manifest"]["properties"].items() if "description" in field}
    assert described == {field.name for field in msgspec.structs.fields(Manifest)}
    assert schema["$defs"]["Preprocessing"]["properties"]["crop"]["description"].startswith("share of the shorter side")


@pytest.mark.parametrize("bundle", ["bundle_path", "dense_path"])
def test_bundles_fit_it(bundle: str, schema: dict[str, Any], request: pytest.FixtureRequest) -> None:
    import jsonschema

    path: Path = request.getfixturevalue(bundle)
    manifest = json.loads((path / "manifest.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(manifest)
    for wrong in (
        {"surprise": 1},
        {"format": "another"},
        {"version": 99},
        {"files": [{"path": "a", "bytes": -1, "sha256": "0" * 64}]},
        {"preprocessing": {"size": 0}},
    ):
        assert not validator.is_valid({**manifest, **wrong}), wrong
    assert not validator.is_valid({key: value for key, value in manifest.items() if key != "pieces"})
