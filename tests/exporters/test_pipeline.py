"""The whole export: what appears, what is refused, and that a failure at any moment leaves nothing behind."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from mvmoe_deploy import bundle as bundles
from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.bundle import Bundle, open_bundle
from mvmoe_deploy.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ConfigError,
    ExportError,
    ImageError,
    VerificationError,
)
from mvmoe_deploy.exporters import pipeline
from mvmoe_deploy.exporters.coreml.exporter import CoreMLOptions
from mvmoe_deploy.exporters.exporter import Options
from mvmoe_deploy.exporters.job import Converted, Job
from mvmoe_deploy.exporters.onnx import convert as onnx_target
from mvmoe_deploy.exporters.pipeline import export_checkpoint, export_model, synthetic_pixels


def nothing_in(folder: Path) -> bool:
    return not list(folder.iterdir())


# what appears


def test_progress_names_each_step(moe_checkpoint: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    export_checkpoint(moe_checkpoint, "onnx", tmp_path / "x.mvmoe", progress=steps.append)
    assert steps[0] == "splitting"
    assert steps[-1] == "writing"
    assert {"trunk: tracing", "expert_00: tracing", "expert_03: verifying", "verifying end to end"} <= set(steps)
    assert "expert_01: tracing" not in steps


def test_the_default_name_stands_in_the_working_directory(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_checkpoint(moe_checkpoint, "onnx").path == Path("moe-onnx.mvmoe")
    assert (tmp_path / "moe-onnx.mvmoe" / "manifest.json").is_file()


def test_a_safetensors_checkpoint_exports_the_same(moe_checkpoint: Path, bundle_path: Path, tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "moe.safetensors", checkpoints.load(moe_checkpoint))
    manifest = export_checkpoint(tmp_path / "moe.safetensors", "onnx", tmp_path / "x.mvmoe").manifest
    assert manifest.files == open_bundle(bundle_path).manifest.files
    assert manifest.source.sha256 == bundles.sha256(tmp_path / "moe.safetensors")


def test_the_report_is_in_the_manifest(bundle_path: Path) -> None:
    report = open_bundle(bundle_path).manifest.verification
    assert report["image_source"] == "synthetic (seed 0)"
    assert report["backend"] == "onnxruntime"
    assert report["top1_agreement"] == report["routing_agreement"] == 1.0
    assert [result["piece"] for result in report["pieces"]] == ["trunk"] + [f"expert_0{e}" for e in range(4)]
    assert report["tolerance"]["logits"] <= 1e-4


def test_real_images_are_used_where_given(moe_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for index, image in enumerate(tiny.images(5)):
        Image.fromarray(image).save(folder / ("sub" if index % 2 else ".") / f"{index}.PNG")
    (folder / "notes.txt").write_text("no image")
    report = export_checkpoint(moe_checkpoint, "onnx", tmp_path / "x.mvmoe", images=folder).manifest.verification
    assert (report["images"], report["image_source"]) == (5, "photos")


def test_of_many_images_some_of_every_folder_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.image_folder(tmp_path, "val", classes=10, per_class=6)
    monkeypatch.setattr(pipeline, "MAX_IMAGES", 10)
    seen: list[str] = []
    monkeypatch.setattr(
        pipeline, "preprocess", lambda file, p: (seen.append(file.parent.name), np.zeros((3, 8, 8), np.float32))[1]
    )
    pipeline.verification_images(tiny.header_for(tiny.moe_config()).preprocessing, tmp_path / "val")
    assert len(seen) == len(set(seen)) == 10


def test_synthetic_images_are_smooth_and_always_the_same() -> None:
    pixels = synthetic_pixels(32, 4)
    assert np.array_equal(pixels, synthetic_pixels(32, 4))
    assert (pixels.shape, pixels.dtype) == ((4, 32, 32, 3), np.uint8)
    assert pixels.std() > 30
    assert np.corrcoef(pixels[:, 1:].ravel(), pixels[:, :-1].ravel())[0, 1] > 0.6  # of white noise: 0


# what is refused


def test_a_target_that_does_not_exist(moe_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown target 'tflite': expected one of onnx, executorch, coreml"):
        export_checkpoint(moe_checkpoint, "tflite", tmp_path / "x.mvmoe")
    assert nothing_in(tmp_path)


def test_a_target_whose_toolchain_is_missing(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mvmoe_deploy.exporters.coreml.convert", raising=False)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    message = r"target coreml needs the package coremltools: pip install 'mvmoe-deploy\[coreml\]'"
    with pytest.raises(ExportError, match=message):
        export_checkpoint(moe_checkpoint, "coreml", tmp_path / "x.mvmoe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(precision="fp8"), "target onnx has no precision 'fp8': expected one of fp32, fp16"),
        (Options(layout="packed"), "target onnx has no layout 'packed': expected one of separate, swappable"),
        (CoreMLOptions(author="A"), "target onnx takes Options, but was given another target's CoreMLOptions"),
    ],
)
def test_an_option_the_target_does_not_have(
    moe_checkpoint: Path, tmp_path: Path, options: Options, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_checkpoint(moe_checkpoint, "onnx", tmp_path / "x.mvmoe", options=options)
    assert nothing_in(tmp_path)


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: no such file"):
        export_checkpoint(tmp_path / "none.pt", "onnx")


def test_folders_of_images_that_are_none(moe_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no image")
    for folder, error, message in (
        ("missing", ImageError, "missing: no such file or folder"),
        ("empty", ImageError, "empty: holds no images"),
        ("bad", ImageError, r"x\.jpg: not an image"),
    ):
        with pytest.raises(error, match=message):
            export_checkpoint(moe_checkpoint, "onnx", tmp_path / "x.mvmoe", images=tmp_path / folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "empty"]


def test_an_existing_bundle_is_replaced_by_force_only(bundle_copy: Path, moe_checkpoint: Path) -> None:
    (bundle_copy / "extra").write_text("of the old one")
    with pytest.raises(ExportError, match=r"moe\.mvmoe: exists already; --force replaces it"):
        export_checkpoint(moe_checkpoint, "onnx", bundle_copy)
    assert (bundle_copy / "extra").exists()
    export_checkpoint(moe_checkpoint, "onnx", bundle_copy, force=True).check()
    assert not (bundle_copy / "extra").exists()
    assert [p.name for p in bundle_copy.parent.iterdir()] == ["moe.mvmoe"]


def test_force_replaces_a_damaged_bundle(bundle_copy: Path, moe_checkpoint: Path) -> None:
    tiny.edit_manifest(bundle_copy, lambda manifest: manifest.update(version=0, pieces=[]))
    export_checkpoint(moe_checkpoint, "onnx", bundle_copy, force=True).check()


@pytest.mark.parametrize("content", ["empty", "files", "foreign manifest", "broken manifest", "file"])
def test_force_does_not_replace_what_is_no_bundle(moe_checkpoint: Path, tmp_path: Path, content: str) -> None:
    """Browser extensions, web apps and Android projects have a manifest.json too."""
    out = tmp_path / "work"
    if content == "file":
        out.write_text("thesis")
    else:
        out.mkdir()
    if content == "files":
        (out / "thesis.txt").write_text("years of work")
    elif content == "foreign manifest":
        (out / "manifest.json").write_text('{"manifest_version": 3, "name": "my extension"}')
    elif content == "broken manifest":
        (out / "manifest.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="work: exists and is not a bundle, so --force does not replace it"):
        export_checkpoint(moe_checkpoint, "onnx", out, force=True)
    assert sorted(tmp_path.rglob("*")) == before


# a failure at any moment


def corrupt_after_converting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter with a bug: one expert's weights are another's."""
    real = onnx_target.convert

    def convert(job: Job[Options]) -> Converted:
        converted = real(job)
        (job.directory / "expert_02.bin").write_bytes((job.directory / "expert_01.bin").read_bytes())
        return converted

    monkeypatch.setattr(onnx_target, "convert", convert)


@pytest.mark.parametrize("force", [False, True])
def test_after_a_failed_verification_there_is_no_bundle_and_no_litter(
    moe_checkpoint: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    corrupt_after_converting(monkeypatch)
    out = bundle_copy if force else bundle_copy.with_name("new.mvmoe")
    with pytest.raises(VerificationError, match="expert_02: differs from PyTorch"):
        export_checkpoint(moe_checkpoint, "onnx", out, force=force)
    assert [p.name for p in bundle_copy.parent.iterdir()] == ["moe.mvmoe"]
    open_bundle(bundle_copy).check()


def test_a_model_of_nan_is_not_exported(tmp_path: Path) -> None:
    model = tiny.lively_model(tiny.moe_config())
    with torch.no_grad():
        model.norm.weight[3] = np.nan
    with pytest.raises(VerificationError):
        export_model(model, tiny.header_for(model.config), "onnx", tmp_path / "x.mvmoe")
    assert nothing_in(tmp_path)


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        "mvmoe_deploy.exporters.onnx.convert._WeightFile.place",  # writing weights
        "mvmoe_deploy.exporters.onnx.convert.ir.save",  # writing a graph
        "mvmoe_deploy.bundle.write_manifest",
        "mvmoe_deploy.files._sync",  # where a full disk may show first
        "mvmoe_deploy.files.tempfile.mkdtemp",
    ],
)
def test_a_full_disk_leaves_nothing(
    moe_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(where, no_space)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(moe_checkpoint, "onnx", tmp_path / "x.mvmoe")
    assert nothing_in(tmp_path)


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.exporters.job import Converted
from mvmoe_deploy.exporters.onnx import convert as onnx
from mvmoe_deploy.exporters.pipeline import export_checkpoint

checkpoint, good, *cases = sys.argv[1:]

def convert(job):
    # pieces that were exported before: what is tested is when the process dies
    manifest = open_bundle(good).manifest
    for number, file in enumerate(manifest.files):
        shutil.copy(Path(good) / file.path, job.directory / file.path)
        if number == 3:
            job.progress("half converted")
    return Converted(manifest.pieces, {})

onnx.convert = convert
ended = []
for step, out in zip(cases[::2], cases[1::2]):
    child = os.fork()
    if not child:
        def progress(what):
            if what == step:
                os.kill(os.getpid(), signal.SIGKILL)

        export_checkpoint(checkpoint, "onnx", out, progress=progress, force=True)
        os._exit(0)
    ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ended))
"""
STEPS = ("half converted", "expert_01: verifying")


@pytest.fixture(scope="module")
def killed(
    moe_checkpoint: Path, bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], tuple[Path, int]]:
    """Exports that were killed: where each wrote, and how it ended, by the step and whether a bundle was there.

    One process forks for each of them, so that torch is imported once.
    """
    cases = {(step, there): tmp_path_factory.mktemp("killed") / "x.mvmoe" for step in STEPS for there in (False, True)}
    for (_, there), out in cases.items():
        if there:
            tiny.copy_of(bundle_path, out.parent).rename(out)
    words = [word for (step, _), out in cases.items() for word in (step, str(out))]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(moe_checkpoint), str(bundle_path), *words],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, zip(cases.values(), json.loads(done.stdout), strict=True), strict=True))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_no_bundle_and_nothing_a_reader_takes_for_one(
    moe_checkpoint: Path, killed: dict[tuple[str, bool], tuple[Path, int]], step: str, existing: bool
) -> None:
    out, ended = killed[step, existing]
    assert ended == -signal.SIGKILL
    if existing:
        open_bundle(out).check()
    else:
        assert not out.exists()
    for litter in out.parent.iterdir():
        if litter != out:
            assert litter.name.startswith(".x.mvmoe.")
            assert litter.suffix == ".tmp"
            with pytest.raises(BundleError, match="not a bundle"):
                open_bundle(litter)
    # and the next export is not in its way
    assert isinstance(export_checkpoint(moe_checkpoint, "onnx", out, force=existing), Bundle)


def test_models_in_memory_need_no_checkpoint(moe_model: models.ViT, tmp_path: Path) -> None:
    manifest = export_model(moe_model, tiny.header_for(moe_model.config), "onnx", tmp_path / "x.mvmoe").manifest
    assert (manifest.source.checkpoint, manifest.source.sha256) == ("", "0" * 64)


def test_names_that_python_could_not_decode(moe_checkpoint: Path, tmp_path: Path) -> None:
    """As in a locale without UTF-8; the manifest is text, so that it holds what the bytes mean."""
    checkpoint = tmp_path / "m\udcc3\udcb6.pt"
    checkpoint.write_bytes(moe_checkpoint.read_bytes())
    bundle = export_checkpoint(checkpoint, "onnx", tmp_path / "m\udcc3\udcb6.mvmoe")
    assert bundle.manifest.source is not None
    assert bundle.manifest.source.checkpoint == "mö.pt"
    assert (tmp_path / "mö.mvmoe").is_dir()
    with pytest.raises(BackendError, match=r"\\xfc\.mvmoe: not UTF-8"):
        export_checkpoint(checkpoint, "onnx", tmp_path / "\udcfc.mvmoe")
