"""A hook of mkdocs: a line such as ``modules of mvmoe_deploy.models except study train`` becomes each module's API."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import mvmoe_deploy

LINE = re.compile(r"^modules of ([\w.]+)(?: except ([\w ]+))?$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs with each page's text."""
    return LINE.sub(lambda match: "\n".join(f"\n::: {name}" for name in modules(match)), markdown)


def modules(match: re.Match[str]) -> Iterator[str]:
    """Names of the modules that a line stands for: the package and what is below it, in order; empty files left out."""
    package, left_out = match[1], (match[2] or "").split()
    root = Path(mvmoe_deploy.__file__).parent  # not by importing packages: they would need PyTorch
    folder = root.joinpath(*package.split(".")[1:])
    files = [Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names]
    for file in sorted(files, key=lambda file: (file.parent, file.name != "__init__.py", file.name)):
        path = file.relative_to(folder).with_suffix("").parts
        if file.suffix == ".py" and file.stat().st_size and path[0] not in left_out:
            yield ".".join([package, *path]).removesuffix(".__init__")
