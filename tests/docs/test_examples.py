"""Examples of the README and the other pages, run as they are written there."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import tiny
from PIL import Image

import mvmoe_deploy
from mvmoe_deploy import checkpoint
from mvmoe_deploy.cli import train as mvmoe_train
from mvmoe_deploy.models.zoo.scripts import __main__ as scripts

ROOT = Path(__file__).parents[2]


def block(title: str, page: str = "README.md") -> str:
    """The fenced block behind a page's ``<!-- tested: TITLE -->``."""
    text = (ROOT / page).read_text(encoding="utf-8")
    match = re.search(rf"<!-- tested: {title} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert match, f"{page} has no block marked {title!r}"
    return match[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone; what the examples write stays in it."""
    folder = tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    return folder


def run(program: list[str], text: str, folder: Path) -> str:
    """Gives a program the text to run, in the folder, as a reader would: with this environment's commands."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        program, input=text, capture_output=True, text=True, cwd=folder, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_five_minutes(clone: Path) -> None:
    """Export, run and inspect in a shell, then the same bundle from Python."""
    output = run(["bash", "-e"], block("five minutes"), clone)
    best = re.findall(r"0025576\.png\n +F (.*?) \(|0012537\.png\n +ㄊ (.*?) \(", output)
    assert best == [("latin capital letter f", ""), ("", "bopomofo letter t")]
    assert "1 evictions" in output
    assert "match their sha256" in output
    assert run([sys.executable, "-"], block("python"), clone).startswith("F latin capital letter f (latin) 0.9")


def test_the_demo(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``make demo`` without fonts: its lines up to the photos, whose model takes long to export."""
    recipe = re.search(r"^demo: \.venv/run\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    lines = recipe[1].replace("$(BIN)/", "").replace("$(SCRIPTS)", "models/zoo/scripts").splitlines()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no glyphs
    monkeypatch.chdir(clone)
    for line in lines:
        program, *words = shlex.split(line.replace(".demo", str(tmp_path)))
        if "models/zoo/moe.safetensors" in words:
            break
        if words[:2] == ["-m", "zipfile"]:
            zipfile.main(words[2:])
        elif words[:3] == ["-P", "-m", "mvmoe_deploy.models.zoo.scripts"]:
            assert scripts.main(words[3:]) == 0
        elif program != "@echo":
            quick = ["--rounds", "5", "--min-seconds", "0.1", "--cold-starts", "1"] if program == "mvmoe-bench" else []
            assert import_module(f"mvmoe_deploy.cli.{program.removeprefix('mvmoe-')}").main([*words, *quick]) == 0
    else:
        pytest.fail("the demo does not end in photos")
    output = capsys.readouterr().out
    assert re.search(
        r"^E Ε Е +latin capital letter e +latin +9\d% +1 \(ĺ l լ\) +0\.99 +66\.8 kB$", output, re.MULTILINE
    )
    assert "28 characters, 7 of 10 experts, 20 loads. Weights in memory: 1.42 MB, of which the one resident" in output
    assert "27 of 28 characters are as in docs/cafe.txt." in output
    rows = re.findall(r"^(dense|moe) .* 6\.357 .* (\d\d\.\d\d) +\d\d\.\d\d +(–|\d\d\.\d\d)$", output, re.MULTILINE)
    assert rows == [("dense", "72.80", "–"), ("moe", "75.60", "78.80")]
    assert "memory MB" in output and "p50 ms" in output


def test_from_your_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On coloured noise, in this process: starting six would take longer than training does."""
    monkeypatch.chdir(tmp_path)
    tiny.image_folder(tmp_path / "photos", "train", classes=4, per_class=6, size=16)
    tiny.image_folder(tmp_path / "photos", "val", classes=4, per_class=1, size=16)
    done = []
    for line in block("own images").replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] != "mvmoe-bench":  # which takes a minute; tests/docs/test_pages.py parses it
            code = import_module(f"mvmoe_deploy.cli.{words[0].removeprefix('mvmoe-')}").main(words[1:])
            assert code == 0, f"{line}\n{capsys.readouterr()}"
            done.append(words[0])
    assert done == ["mvmoe-train"] * 4 + ["mvmoe-export"]
    assert (tmp_path / "photos.mvmoe" / "manifest.json").is_file()


def test_the_preparation_of_tiny_imagenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a miniature of the public archive, which has its layout, in place of the download."""
    monkeypatch.chdir(tmp_path)
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(picture, "JPEG")
    ids = ["n01443537", "n01629819", "n04067472"]
    files: dict[str, str | bytes] = {
        "wnids.txt": "\n".join(ids),
        "words.txt": "n00001740\tentity\n" + "".join(f"{i}\tname of {i}, another name\n" for i in ids),
        "test/images/test_0.JPEG": picture.getvalue(),
        "val/val_annotations.txt": "".join(f"val_{n}.JPEG\t{ids[n % 3]}\t0\t32\t44\t62\n" for n in range(6)),
    }
    files |= {f"val/images/val_{n}.JPEG": picture.getvalue() for n in range(6)}
    for class_id in ids:
        files[f"train/{class_id}/{class_id}_boxes.txt"] = f"{class_id}_0.JPEG\t0\t10\t63\t58\n"
        files |= {f"train/{class_id}/images/{class_id}_{n}.JPEG": picture.getvalue() for n in range(4)}
    with zipfile.ZipFile("tiny-imagenet-200.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    download, *steps = block("tiny imagenet", "docs/training.md").splitlines()
    assert download.startswith("curl ")
    run(["bash", "-e"], "\n".join(steps), tmp_path)
    arguments = ["--data", "tiny-imagenet-32", "--model", "vit_1x16", "--epochs", "1", "--out", "dense.pt"]
    assert mvmoe_train.main(arguments) == 0
    output = capsys.readouterr().out
    assert "train: 12 images of 3 classes; left out: 3 files that are no image" in output
    assert "val: 6 images of 3 classes\n" in output
    assert checkpoint.load(tmp_path / "dense.pt").header.class_names == [f"name of {i}" for i in ids]


def test_a_model_of_your_own(tmp_path: Path) -> None:
    code = block("own model", "docs/adding-an-architecture.md")
    run([sys.executable, "-"], code, tmp_path)
    with mvmoe_deploy.load(tmp_path / "mine.mvmoe") as runtime:
        assert {score.label for score in runtime.predict(tiny.images(1)[0]).top} == {"cat", "dog", "car", "bus"}
