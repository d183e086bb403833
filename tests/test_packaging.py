"""The project as others get it: a wheel and an sdist that build, and a wheel that works where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dist`` with a wheel and an sdist, built from a copy of what git would ship."""
    source = tmp_path_factory.mktemp("source") / "project"
    ignore = shutil.ignore_patterns(".*", "tests", "docs", "build", "dist", "*.egg-info", "__pycache__", "*.mvmoe")
    shutil.copytree(ROOT, source, ignore=ignore)
    # the sdist first and the wheel from it, so that an sdist lacking a file shows
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source)
    return source / "dist"


def test_wheel_and_sdist_hold_every_module(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {"mvmoe_deploy": "mvmoe_deploy"} | {f: f"mvmoe_deploy/{f}" for f in ("models", "exporters", "bench")}
    for folder, package in packages.items():
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder).as_posix()}" in names
    assert "mvmoe_deploy/py.typed" in names
    assert not any(name.startswith(("models/", "bench/", "exporters/", "tests/")) for name in names)
    with tarfile.open(sdist) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "models/architectures/vit.py", "mvmoe_deploy/py.typed"} <= shipped


def test_the_wheel_works_in_a_fresh_environment(built: Path, tmp_path: Path) -> None:
    """Its dependencies come from this environment, so that nothing is fetched; the project does not."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    binaries = tmp_path / "venv" / "bin"
    python = binaries / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    dependencies = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    code = (
        "import mvmoe_deploy, mvmoe_deploy.exporters.pipeline, mvmoe_deploy.bench.report.page, mvmoe_deploy.models as m;"
        "from mvmoe_deploy.bench.candidates.suite import choose_scales; assert len(choose_scales(None)) == 12;"
        "print(mvmoe_deploy.__file__); print(m.__file__); print(len(m.SCALES))"
    )
    done = run(python, "-I", "-c", code, cwd=tmp_path)
    package, models, scales = done.stdout.split()
    assert Path(package).is_relative_to(site)
    assert Path(models).is_relative_to(site)
    assert scales == "12"
    for name in ("export", "run", "inspect", "train", "bench"):
        assert (binaries / f"mvmoe-{name}").is_file()
    assert "usage: mvmoe-inspect" in run(binaries / "mvmoe-inspect", "--help", cwd=tmp_path).stdout
