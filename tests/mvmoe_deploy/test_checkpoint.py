"""Checkpoints are read back as written, and nothing in a foreign file is trusted or executed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save as save_safetensors
from safetensors.torch import save_file

from mvmoe_deploy import checkpoint as checkpoints
from mvmoe_deploy import models
from mvmoe_deploy.checkpoint import Checkpoint
from mvmoe_deploy.errors import CheckpointError
from mvmoe_deploy.tensor_files import PLACEHOLDER, seal

SUFFIXES = [".pt", ".safetensors"]


@pytest.fixture
def checkpoint() -> Checkpoint:
    return tiny.checkpoint_of(tiny.lively_model(tiny.moe_config()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_it_reads_back_as_written(checkpoint: Checkpoint, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"moe{suffix}"
    checkpoints.save(path, checkpoint)
    read = checkpoints.load(path)
    assert read.header == checkpoint.header
    assert set(read.weights) == set(checkpoint.weights)
    assert all(torch.equal(read.weights[name], tensor) for name, tensor in checkpoint.weights.items())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_half_precision_halves_the_file_and_reads_as_float32(
    checkpoint: Checkpoint, suffix: str, tmp_path: Path
) -> None:
    full, half = tmp_path / f"full{suffix}", tmp_path / f"half{suffix}"
    checkpoints.save(full, checkpoint)
    checkpoints.save(half, checkpoint, "float16")
    weights = sum(t.numel() for t in checkpoint.weights.values())
    assert full.stat().st_size - half.stat().st_size == pytest.approx(2 * weights, rel=0.05)
    for name, tensor in checkpoints.load(half).weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, checkpoint.weights[name].half().float())


def test_the_model_of_a_checkpoint(checkpoint: Checkpoint, moe_model: models.ViT) -> None:
    model = models.load_model(checkpoint)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(tiny.inputs(4)), moe_model(tiny.inputs(4)))


def test_another_suffix_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"moe\.bin: a checkpoint's name ends in \.pt or \.safetensors"):
        checkpoints.save(tmp_path / "moe.bin", checkpoint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_keeps_the_old_file_and_is_named(
    checkpoint: Checkpoint, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"moe{suffix}"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left") as caught:
            checkpoints.save(path, checkpoint)
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


# what is not a checkpoint


def test_no_such_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt: no such file"):
        checkpoints.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a directory"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(5000), b"\xff" * 64, b"PK\x03\x04" + bytes(60)])
def test_a_file_of_something_else(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"foreign\.(pt: (not a checkpoint|damaged)|safetensors: (damaged|its head))"
    ):
        checkpoints.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_checkpoint(checkpoint: Checkpoint, suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    checkpoints.save(path, checkpoint)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r"cut\."):
        checkpoints.load(path)


def test_a_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "photos.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(CheckpointError, match=r"photos\.pt: damaged"):
        checkpoints.load(path)


class Bomb:
    """Pickles to a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("inside", ["instead", "weights", "training", "model"])
def test_code_in_a_pickle_is_refused_and_not_executed(checkpoint: Checkpoint, inside: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "executed"
    raw: dict[str, Any] = {**msgspec.to_builtins(checkpoint.header), "weights": dict(checkpoint.weights)}
    if inside == "instead":
        torch.save(Bomb(trace), path)
    else:
        raw[inside]["x"] = Bomb(trace)
        torch.save(raw, path)
    with pytest.raises(
        CheckpointError, match=r"evil\.pt: (refused, it holds more|weights\['x'\] is a \w+\.mkdir, not)"
    ):
        checkpoints.load(path)
    assert not trace.exists()
    # the bomb is one: an ordinary load sets it off
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_a_bare_pickle_with_code_is_not_executed(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(CheckpointError, match=r"evil\.pt: not a checkpoint"):
        checkpoints.load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "foreign", [{"model": {}, "optimizer": {}}, {"a": torch.zeros(2)}, [1, 2], torch.zeros(3), {1: 2}, {}]
)
def test_a_pt_file_of_another_program(foreign: Any, tmp_path: Path) -> None:
    path = tmp_path / "deit.pt"
    torch.save(foreign, path)
    with pytest.raises(CheckpointError, match=r"deit\.pt: not a checkpoint of this project"):
        checkpoints.load(path)


@pytest.mark.parametrize("metadata", [None, {"mvmoe": "{}"}, {"mvmoe": "[1]"}, {"format": "pt"}])
def test_a_safetensors_file_of_another_program(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        checkpoints.load(path)


def test_a_safetensors_header_that_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    for text in ("{", "[" * 100_000):
        save_file({"a": torch.zeros(2)}, path, metadata={"mvmoe": text})
        with pytest.raises(CheckpointError, match=r"vit\.safetensors: damaged"):
            checkpoints.load(path)


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw.pop(name)


def put(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda raw: raw.update(values)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("format"), "not a checkpoint of this project"),
        (put(version=3), "format version '3', this release reads 1 and 2"),
        (put(version=True), "format version 'True'"),
        (put(version="1"), "format version '1'"),
        (drop("version"), "format version 'None'"),
        (put(model={"architecture": ["vit"], "classes": 6, "image_size": 32}), "architecture is not a string"),
        (put(model={"architecture": "vit", "classes": 6.0, "image_size": 32}), "classes is not an integer"),
        (drop("model"), "missing required field `model`"),
        (drop("class_ids"), "missing required field `class_ids`"),
        (drop("class_names"), "missing required field `class_names`"),
        (drop("preprocessing"), "missing required field `preprocessing`"),
        (put(colour=1), "unknown field `colour`"),
        (put(model=3), r"Expected `object`, got `int` - at `\$\.model`"),
        (put(class_ids=["a"]), "1 class_ids but 6 class_names"),
        (put(class_ids=["a"], class_names=["a"]), "the model has 6 classes, but 1 are named"),
        (put(preprocessing={"size": 64}), "the model takes images of size 32, preprocessing gives 64"),
        (put(preprocessing={"size": 32, "crop": 7.0}), r"\$\.preprocessing\.crop"),
        (put(preprocessing={"size": 32, "std": [0.0, 1.0, 1.0]}), r"\$\.preprocessing\.std"),
        (put(preprocessing={"size": 10**9}), r"\$\.preprocessing\.size"),
        (put(superclasses={"names": ["a"], "of_class": [0, 0, 0, 0, 0, 1]}), "one super-class per class"),
        (put(superclasses={"names": ["a"], "of_class": [0]}), "one super-class per class"),
        (put(superclasses={"names": ["a"], "of_class": [0] * 7}), "one super-class per class"),
        (put(superclasses={"names": ["a"], "of_class": [0, 0, 0, 0, 0, -1]}), "one super-class per class"),
        (put(model={"architecture": "vit", "classes": 6, "image_size": True}), "image_size is not an integer"),
    ],
)
def test_a_header_that_is_incomplete_or_inconsistent(
    checkpoint: Checkpoint, suffix: str, edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    raw = msgspec.to_builtins(checkpoint.header)
    edit(raw)
    path = tmp_path / f"odd{suffix}"
    if suffix == ".pt":
        torch.save({**raw, "weights": checkpoint.weights}, path)
    else:
        weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
        path.write_bytes(seal(save_safetensors(weights, {"mvmoe": json.dumps(raw), "sha256": PLACEHOLDER})))
    with pytest.raises(CheckpointError, match=rf"odd{suffix}: .*{message}"):
        checkpoints.load(path)


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format is 'other', expected 'mvmoe-checkpoint'; use new_header"),
        ({"version": 3}, "format version '3', this release reads 1 and 2"),
        ({"training": deep(100_000)}, "recursion"),
    ],
)
def test_a_header_made_in_memory_is_not_written_wrong(
    checkpoint: Checkpoint, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    header = msgspec.structs.replace(checkpoint.header, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.save(tmp_path / "odd.pt", Checkpoint(header, checkpoint.weights))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_weight_that_is_a_view_takes_only_its_own_bytes(checkpoint: Checkpoint, suffix: str, tmp_path: Path) -> None:
    path, whole = tmp_path / f"view{suffix}", torch.zeros(1_000_000)
    checkpoints.save(path, Checkpoint(checkpoint.header, {"a": whole[:10], "b": whole[5:15]}))
    assert path.stat().st_size < 10_000


def test_a_pt_file_of_another_program_does_not_say_that_it_is_a_checkpoint(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    own, other = tmp_path / "own.pt", tmp_path / "other.pt"
    checkpoints.save(own, checkpoint)
    torch.save({"state_dict": {}}, other)
    assert checkpoints.is_checkpoint(own) and not checkpoints.is_checkpoint(other)


@pytest.mark.parametrize(
    ("weights", "message"),
    [(None, "lacks 'weights'"), ([1], "lacks 'weights'"), ({"a": 3}, r"weights\['a'\] is a int, not a tensor")],
)
def test_weights_that_are_none(checkpoint: Checkpoint, weights: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save({**msgspec.to_builtins(checkpoint.header), "weights": weights}, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path)


# damage that keeps the file readable


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_flipped_bit_changes_a_value(checkpoint: Checkpoint, suffix: str, tmp_path: Path) -> None:
    """In a .pt file, flipped bits in zip's own fields may go unnoticed; the contents that are read are then unchanged."""
    path = tmp_path / f"moe{suffix}"
    checkpoints.save(path, checkpoint, "float16")
    content, whole = path.read_bytes(), checkpoints.load(path)
    generator = np.random.default_rng(0)
    refused = 0
    for place in generator.integers(0, len(content), 400):
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            read = checkpoints.load(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert read.header == whole.header
        assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in read.weights.items())
    assert refused == 400 if suffix == ".safetensors" else refused > 250


def test_a_safetensors_file_that_has_lost_its_sha256_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Otherwise whoever drops it could change weights unnoticed; version 1 is the only one that has none."""
    raw = msgspec.to_builtins(checkpoint.header)
    save_file(checkpoint.weights, tmp_path / "moe.safetensors", metadata={"mvmoe": json.dumps(raw)})
    with pytest.raises(CheckpointError, match=r"moe\.safetensors: damaged: its header lacks its sha256"):
        checkpoints.load(tmp_path / "moe.safetensors")


def test_a_checkpoint_of_the_first_version_is_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Version 1's .safetensors files, such as the zoo's, have no sha256."""
    raw = {**msgspec.to_builtins(checkpoint.header), "version": 1}
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    save_file(weights, tmp_path / "old.safetensors", metadata={"mvmoe": json.dumps(raw)})
    torch.save({**raw, "weights": checkpoint.weights}, tmp_path / "old.pt")
    for name in ("old.safetensors", "old.pt"):
        read = checkpoints.load(tmp_path / name)
        assert all(torch.equal(tensor, checkpoint.weights[key]) for key, tensor in read.weights.items())


# what costs more than it looks


def pt_with(checkpoint: Checkpoint, path: Path, weights: Any) -> Path:
    torch.save({**msgspec.to_builtins(checkpoint.header), "weights": weights}, path)
    return path


SCALAR = torch.zeros(1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda: {"a": SCALAR.expand(1 << 20, 1 << 20)}, r"weights\['a'\] has elements that overlap in memory"),
        (lambda: {"a": torch.zeros(100).as_strided((50, 50), (1, 1))}, "overlap in memory"),
        (lambda: {f"w{i}": torch.zeros(0) for i in range(20_000)}, "has 20000 weights, more than|larger than"),
        (lambda: {f"w{i}": BIG for i in range(8)}, "its weights are larger than the file can hold"),
        (lambda: {"a": torch.zeros(3, dtype=torch.int8)}, "is of type I8"),
        (lambda: {"a": torch.zeros(3, dtype=torch.complex64)}, "is of type C64"),
        (lambda: {"a": torch.zeros(3, dtype=torch.int64)}, "is of type I64"),
        (lambda: {"a": torch.zeros(3).to_sparse()}, "is sparse"),
        (lambda: {"a": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8)}, "is quantised"),
        (lambda: {"a": {"b": torch.zeros(3)}}, "is a dict, not a tensor|is a _Dict"),
        (lambda: {"a": None}, "is a NoneType"),
        (lambda: {1: torch.zeros(3)}, "a name that is not a string"),
    ],
)
def test_weights_are_looked_at_before_they_are_read(
    checkpoint: Checkpoint, weights: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    path = pt_with(checkpoint, tmp_path / "odd.pt", weights())
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path)


BIG = torch.zeros(1 << 20)


def test_views_transposed_weights_and_counters_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    weights = {"t": whole.t(), "rows": whole[1:3], "half": whole.bfloat16()[:, ::2], "count": torch.tensor(7)}
    read = checkpoints.load(pt_with(checkpoint, tmp_path / "views.pt", weights)).weights
    assert {name: tensor.tolist() for name, tensor in read.items()} == {n: t.tolist() for n, t in weights.items()}
    read["t"].zero_()  # each its own
    assert read["rows"].sum() == whole[1:3].sum()


def zipped(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_a_weight_beyond_the_end_of_its_data(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The entry's own checksum is right; what was behind it in memory would be read as the last weight."""
    with zipfile.ZipFile(pt_with(checkpoint, tmp_path / "whole.pt", {"a": torch.arange(12.0)})) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for missing in (0, 1, 4):
        short = {name: data[: 48 - missing] if name.endswith("/data/0") else data for name, data in entries.items()}
        path = zipped(tmp_path / f"{missing}.pt", short)
        if not missing:
            assert checkpoints.load(path).weights["a"].tolist() == list(range(12))
            continue
        with pytest.raises(CheckpointError, match=r"weights\['a'\] reaches beyond the end of its stored data"):
            checkpoints.load(path)


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", r"damaged"),
        (b".", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "not a checkpoint of this project"),  # a memo's number, 2^31 - 1
        (b"\x80\x02\x96\xff\xff\xff\xff\xff\x00\x00\x00.", "damaged"),  # a bytearray of 2^40 bytes
        (b"\x80\x02X\xff\xff\xff\x7fa.", "damaged"),  # a text of 2 GB
        (b"\x80\x02" + b"(" * 1000 + b".", "damaged"),
        (b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b".", "not a checkpoint"),
        (b"\x80\x02}G?\xf0\x00\x00\x00\x00\x00\x00K\x01s.", "a key is a float"),
        (b"\x80\x02}\x8a\x08" + b"\xff" * 7 + b"\x7fK\x01s.", "a key is a int"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "in an unknown way"),
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "refused, it holds more .*os.system"),
    ],
)
def test_pickles_that_torch_would_not_write(pickled: bytes, message: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.pt", {"x/data.pkl": pickled, "x/byteorder": b"little"})
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.load(path)
    assert "\n" not in str(caught.value)


def test_a_value_that_is_shared_without_end(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Thirty lists, each twice in the next: a few bytes that read as a billion values."""
    shared: list[Any] = ["x"]
    for _ in range(30):
        shared = [shared, shared]
    raw = {**msgspec.to_builtins(checkpoint.header), "weights": checkpoint.weights, "training": {"x": shared}}
    torch.save(raw, tmp_path / "shared.pt")
    with pytest.raises(CheckpointError, match="more or deeper values than any checkpoint has"):
        checkpoints.load(tmp_path / "shared.pt")


def test_texts_that_are_no_unicode(checkpoint: Checkpoint, tmp_path: Path) -> None:
    raw = {**msgspec.to_builtins(checkpoint.header), "weights": checkpoint.weights}
    raw["class_names"] = ["\ud800", *raw["class_names"][1:]]
    torch.save(raw, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"a string that is not valid Unicode|damaged"):
        checkpoints.load(tmp_path / "odd.pt")


def test_compressed_and_overlong_entries(tmp_path: Path) -> None:
    path = zipped(tmp_path / "bomb.pt", {"x/data.pkl": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"larger than the file|compressed"):
        checkpoints.load(path)
    path = zipped(tmp_path / "zeros.pt", {"x/data.pkl": bytes(8 << 20)})
    with pytest.raises(CheckpointError, match=r"data\.pkl is larger than 4 MB"):
        checkpoints.load(path)


def test_a_safetensors_header_that_is_too_long_to_read(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes((5 << 20).to_bytes(8, "little") + b"{}".ljust(5 << 20))
    with pytest.raises(CheckpointError, match=r"long\.safetensors: its header is larger than 4 MB"):
        checkpoints.load(path)


HEADERS: list[tuple[Any, bytes, str]] = [
    ({"a": {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 4]}}, bytes(4), "one after the other"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"", "has .* bytes, its header says"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "one after the other"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4), "one after"),
    ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4), "damaged"),
    ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), "damaged"),
    ({"a": 3}, b"", "damaged"),
    ([], b"", "damaged"),
    ({"__metadata__": {"mvmoe": 3}}, b"", "damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "data", "message"), HEADERS)
def test_safetensors_headers_that_lie(header: Any, data: bytes, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "I8", "U8", "BOOL", "I64", "C64", "nonsense"])
def test_safetensors_of_other_types(checkpoint: Checkpoint, dtype: str, tmp_path: Path) -> None:
    size = {"I64": 8, "C64": 8}.get(dtype, 1)
    raw = {**msgspec.to_builtins(checkpoint.header), "version": 1}
    header = {"__metadata__": {"mvmoe": json.dumps(raw)},
              "head.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}}  # fmt: skip
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * size))
    with pytest.raises(CheckpointError, match=rf"weights\['head\.weight'\] is of type {dtype}, expected F32, F16"):
        checkpoints.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pipes_and_devices_do_not_hang(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        checkpoints.load(path)
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        checkpoints.load(tmp_path / f"zero{suffix}")


def test_what_cannot_be_opened_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.pt"
    path.write_bytes(b"")

    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(CheckpointError, match=r"secret\.pt: cannot be read \(Permission denied\)"):
        checkpoints.load(path)
    monkeypatch.undo()
    for name in ("x" * 5000, "a\0b.pt"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoints.load(name)
