"""What the workflows say is held to what there is, since they run elsewhere."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def commands(job: dict[str, Any]) -> list[str]:
    """The job's commands, once for each combination of its matrix."""
    matrix = {
        key: values for key, values in job.get("strategy", {}).get("matrix", {}).items() if isinstance(values, list)
    }
    found = []
    for values in itertools.product(*matrix.values()):
        for step in job["steps"]:
            text = step.get("run", "")
            for key, value in zip(matrix, values, strict=True):
                text = re.sub(rf"\$\{{\{{ *matrix\.{key} *\}}\}}", str(value), text)
            found.append(text)
    return found


def called(workflow: dict[str, Any]) -> set[str]:
    """The make targets that a workflow calls."""
    text = "\n".join(command for job in workflow["jobs"].values() for command in commands(job))
    assert "${{" not in text, text
    return set(re.findall(r"\bmake (?:[A-Z]+=\S+ )*(\S+)", text))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow[True]  # YAML reads the key "on" as true
    assert called(workflow) <= TARGETS
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert "@" in step.get("uses", "@"), f"{step}: without a version"


def test_what_people_run_is_run() -> None:
    ran = set().union(*(called(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in WORKFLOWS))
    assert {"lint", "test", "docs"} <= ran


def test_a_target_that_is_not_there_would_be_seen() -> None:
    job = {"strategy": {"matrix": {"to": ["lint", "gone"]}}, "steps": [{"run": "make ${{ matrix.to }}"}]}
    assert called({"jobs": {"a": job}}) - TARGETS == {"gone"}
