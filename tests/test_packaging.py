"""The project as others get it: a wheel and an sdist that build, and a wheel that works where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mvmoe_deploy

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would ship."""
    source = tmp_path_factory.mktemp("source") / "project"
    left = (".*", "tests", "docs", "site", "build", "dist", "*.egg-info", "__pycache__", "*.mvmoe")
    return Path(shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*left)))


@pytest.fixture(scope="module")
def built(source: Path) -> Path:
    """``dist`` with a wheel and an sdist."""
    # the sdist first and the wheel from it, so that an sdist lacking a file shows
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source)
    return source / "dist"


def test_wheel_and_sdist_hold_every_module(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {"mvmoe_deploy": "mvmoe_deploy"} | {
        f: f"mvmoe_deploy/{f}" for f in ("models", "exporters", "bench", "runtimes")
    }
    for folder, package in packages.items():
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder).as_posix()}" in names
    for folder in ("src", "app"):
        for file in (ROOT / "runtimes" / "web" / folder).glob("*"):
            assert f"mvmoe_deploy/runtimes/web/{folder}/{file.name}" in names
    assert "mvmoe_deploy/py.typed" in names
    assert not any(name.startswith(("models/", "bench/", "exporters/", "runtimes/", "tests/")) for name in names)
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "models/architectures/vit.py", "mvmoe_deploy/py.typed"} <= shipped


def fresh_environment(folder: Path) -> tuple[Path, list[object]]:
    """An environment's python, and the pip call that installs into it.

    Dependencies come from this environment, so that nothing is fetched; the project does not.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "mvmoe" not in entry.name and entry.suffix != ".pth" and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    return python, [*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]


IMPORTS = """
import mvmoe_deploy, mvmoe_deploy.exporters.pipeline, mvmoe_deploy.bench.report.page, mvmoe_deploy.models as m
from mvmoe_deploy.bench.candidates.suite import choose_scales
assert len(choose_scales(None)) == 12
assert (m.ZOO / "moe.safetensors").is_file()
assert (m.ZOO / "scripts" / "moe.safetensors").is_file() and (m.ZOO / "scripts" / "sample" / "val.zip").is_file()
from mvmoe_deploy.runtimes import WEB
assert (WEB / "src" / "index.js").is_file()
print(mvmoe_deploy.__file__, m.__file__, len(m.SCALES), mvmoe_deploy.__version__)
"""
"""A module of every folder, and files that are no modules."""


def test_the_wheel_works_in_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    python, install = fresh_environment(tmp_path / "venv")
    run(*install, wheel)
    package, models, scales, version = run(python, "-I", "-c", IMPORTS, cwd=tmp_path).stdout.split()
    assert Path(package).is_relative_to(tmp_path / "venv")
    assert Path(models).is_relative_to(tmp_path / "venv")
    assert scales == "12"
    assert wheel.name.startswith(f"mvmoe_deploy-{version}-")
    for name in ("export", "run", "inspect", "train", "bench"):
        assert (python.parent / f"mvmoe-{name}").is_file()
    assert "usage: mvmoe-inspect" in run(python.parent / "mvmoe-inspect", "--help", cwd=tmp_path).stdout


def test_an_editable_installation_has_every_folder(source: Path, tmp_path: Path) -> None:
    """Three of the four lie beside the package, not in it, and what Python finds first in the checkout lacks them."""
    checkout = Path(shutil.copytree(source, tmp_path / "project"))
    python, install = fresh_environment(tmp_path / "venv")
    run(*install, "--no-build-isolation", "--editable", checkout)
    with (checkout / "models" / "__init__.py").open("a") as file:
        file.write("\nEDITED = True\n")
    package, models, *_ = run(python, "-c", f"{IMPORTS}\nassert m.EDITED", cwd=checkout).stdout.split()
    assert Path(package) == checkout / "mvmoe_deploy" / "__init__.py"
    assert Path(models) == checkout / "models" / "__init__.py"
    assert "usage: mvmoe-inspect" in run(python.parent / "mvmoe-inspect", "--help", cwd=tmp_path).stdout


def test_the_version_is_said_once() -> None:
    version = mvmoe_deploy.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{version}"' not in project
    assert 'version = { attr = "mvmoe_deploy.__version__" }' in project
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_dependency_is_pinned() -> None:
    """What an extra names has a version in constraints.txt, which make installs and which satisfies it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(p.name): p.specifier for p in map(Requirement, lines[1:])}
    for extra, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for wanted in map(Requirement, texts):
            if wanted.name != project["name"]:
                (pin,) = pinned.get(canonicalize_name(wanted.name), [None])
                assert pin is not None, f"[{extra}] needs {wanted.name}, which constraints.txt does not pin"
                assert wanted.specifier.contains(pin.version), f"[{extra}] needs {wanted}, pinned is {pin.version}"
