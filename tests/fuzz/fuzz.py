"""Damaged and hostile files by the thousand: nothing may crash, hang, leak another library's error or answer wrongly.

    make fuzz
    python tests/fuzz/fuzz.py --cases 12000 --seed 3
    python tests/fuzz/fuzz.py --only piece --first 71 --cases 1    # one case again

Each case is a function of its kind, the seed and its number. Workers run them under limits of time and memory; one that
dies or does not answer is replaced, and its case counted. What counts as right: a file whose sha256 or CRC no longer
matches is refused, unless it reads as it did before; one whose sha256 was put right is legitimately another, so that it
is refused or gives finite answers of the declared shape. A refusal is an error of this project, in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

SHARES = {"manifest": 0.3, "piece": 0.3, "checkpoint": 0.2, "image": 0.15, "data": 0.05}
"""Of all cases, by kind."""

SECONDS = 20
"""Longest that a case may take, on a machine that does other things too; the slowest take a tenth of one."""

MEMORY = 3 << 30
"""Most bytes of private memory that a worker may have, of which PyTorch and onnxruntime take 0.3 GB."""

PEAK = 1 << 30
"""Most that one case may add to the worker's largest resident size."""

ODD = [
    None, True, -1, 0, 1, 2, 7, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63), 1e308, 0.5, -0.0, "", "x", "../x", "/etc/passwd",
    "a" * 5000, "\x1b[31m", "\u202e", "batch", "float16", "int64", [], {}, [[]], [0], [1, 2, 3], {"a": 1}, ["x"] * 100,
]  # fmt: skip
"""What takes a value's place."""


class Wrong(Exception):  # noqa: N818  (it says what was found)
    """An answer that must not be given."""


# The worker


@dataclass
class Worker:
    """One process's copy of the files to damage."""

    base: Path
    folder: Path
    models: dict[str, Any] = field(default_factory=dict)

    def run(self, kind: str, seed: int, number: int) -> str:
        """Runs one case and says how it ended."""
        from mvmoe_deploy.errors import MvmoeError

        rng = random.Random(f"{kind} {seed} {number}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = CASES[kind](self, rng)
        except MvmoeError as error:
            text = str(error)
            outcome = "refused" if text.isprintable() and 0 < len(text) < 3000 else f"BAD message: {text[:200]!r}"
        except Wrong as error:
            outcome = f"BAD answer: {error}"
        except Exception as error:
            outcome = f"BAD {type(error).__name__}: {str(error)[:200]!r}"
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        return outcome if grown < PEAK else f"BAD memory: {grown / 1e9:.1f} GB"


def flip(rng: random.Random, content: bytes, most: int = 4) -> bytes:
    """A few bits flipped, or bytes cut, doubled or overwritten."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(damaged)) if damaged else 0
        how = rng.random()
        if not damaged or how < 0.03:
            return bytes(damaged[:place])
        if how < 0.8:
            damaged[place] ^= 1 << rng.randrange(8)
        elif how < 0.9:
            damaged[place : place + 8] = rng.choice([bytes(8), b"\xff" * 8, rng.randbytes(8)])
        else:
            damaged[place:place] = damaged[place : place + rng.randint(1, 40)]
    return bytes(damaged)


def edit(rng: random.Random, tree: Any) -> None:
    """Replaces, removes, doubles or swaps something somewhere in a tree of dicts and lists."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    how = rng.random()
    if how < 0.6:
        node[key] = copy.deepcopy(rng.choice(ODD))
    elif how < 0.75:
        del node[key]
    elif how < 0.85 and isinstance(node, list):
        node.insert(rng.randrange(len(node)), copy.deepcopy(node[key]))
    else:
        other, place = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            node[key] = copy.deepcopy(other[place])


def bundle_copy(worker: Worker, rng: random.Random) -> Path:
    """The worker's copy of a bundle, undamaged."""
    name = rng.choice(sorted(path.name for path in worker.base.glob("*.mvmoe")))
    target = worker.folder / name
    if not target.exists():
        shutil.copytree(worker.base / name, target)
    return target


@contextlib.contextmanager
def restored(bundle: Path, original: Path, *names: str) -> Any:
    """Puts files back afterwards, with the manifest."""
    try:
        yield
    finally:
        for name in {*names, "manifest.json", "manifest.sha256"}:
            (bundle / name).write_bytes((original / name).read_bytes())


def use(bundle: Path, rng: random.Random, **options: Any) -> str:
    """Loads a bundle and classifies an image with it."""
    import numpy as np
    import tiny

    import mvmoe_deploy

    with mvmoe_deploy.load(bundle, **options) as runtime:
        image = tiny.images(1, seed=rng.randrange(9))[0]
        prediction = runtime.predict(image, rng.choice([1, 3, 5, 6]))
        scores = [score.probability for score in prediction.top]
        if not all(isinstance(score.label, str) for score in prediction.top) or not 0 < sum(scores) < 1.01:
            raise Wrong(f"probabilities {scores}")
        size, classes = runtime.bundle.manifest.preprocessing.size, len(runtime.bundle.manifest.class_names)
        logits, routed = runtime.run(np.zeros((2, 3, size, size), np.float32))
        if logits.shape != (2, classes) or np.isnan(logits).any():
            raise Wrong(f"logits {logits.shape}")
        if routed is not None and not (0 <= routed.gates.min() <= routed.gates.max() <= 1.01):
            raise Wrong("gates")
    return "accepted"


def manifest_case(worker: Worker, rng: random.Random) -> str:
    """Bits of a manifest, which its sha256 must see; or values of it, with a sha256 that fits."""
    import tiny

    from mvmoe_deploy.bundle import open_bundle

    bundle = bundle_copy(worker, rng)
    with restored(bundle, worker.base / bundle.name):
        if rng.random() < 0.5:
            name = rng.choice(["manifest.json"] * 9 + ["manifest.sha256"])
            content = (bundle / name).read_bytes()
            damaged = flip(rng, content, 1 if rng.random() < 0.7 else 4)
            (bundle / name).write_bytes(damaged)
            before = open_bundle(worker.base / bundle.name).manifest
            if open_bundle(bundle).manifest != before:
                raise Wrong("a changed value was accepted")
            return "unchanged"

        def change(manifest: dict[str, Any]) -> None:
            for _ in range(rng.randint(1, 3)):
                edit(rng, manifest)

        tiny.edit_manifest(bundle, change)
        return use(bundle, rng)


def piece_case(worker: Worker, rng: random.Random) -> str:
    """A piece that was altered, its sha256 with it (or, of some, not)."""
    import tiny

    bundle = bundle_copy(worker, rng)
    name = rng.choice(sorted(path.name for path in bundle.iterdir() if path.suffix in (".onnx", ".bin")))
    if rng.random() < 0.8:
        name = rng.choice(sorted(path.name for path in bundle.iterdir() if path.suffix == ".onnx"))
    content = (bundle / name).read_bytes()
    structured = name.endswith(".onnx") and rng.random() < 0.7
    with restored(bundle, worker.base / bundle.name, name):
        damaged = graph_edit(rng, content) if structured else flip(rng, content, 8)
        (bundle / name).write_bytes(damaged)
        if rng.random() < 0.05:
            if damaged != content:
                from mvmoe_deploy.bundle import open_bundle

                open_bundle(bundle).check()
                raise Wrong("a file with another sha256 was accepted")
            return "unchanged"
        tiny.rehash(bundle)
        return use(bundle, rng, preload="all")


def graph_edit(rng: random.Random, content: bytes) -> bytes:
    """Changes to an ONNX file that leave it one: attributes, operators, shapes, constants, inserted operators."""
    import onnx

    proto = onnx.ModelProto()
    proto.ParseFromString(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        rng.choice([edit_attribute, edit_operator, edit_constant, edit_type, insert_node, insert_node, insert_killer])(
            rng, proto
        )
    return bytes(proto.SerializeToString())


INTEGERS = [0, -1, 1, 2, 3, 7, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), -(1 << 31)]


def edit_attribute(rng: random.Random, proto: Any) -> None:
    """Another value for an attribute."""
    nodes = [node for node in proto.graph.node if node.attribute]
    if not nodes:
        return
    attribute = rng.choice(rng.choice(nodes).attribute)
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(INTEGERS)
    elif attribute.type == 2:
        attribute.i = rng.choice(INTEGERS)
    elif attribute.type == 1:
        attribute.f = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e38])
    else:
        attribute.s = rng.choice([b"", b"SAME_UPPER", b"\xff", b"tanh"])
    if rng.random() < 0.1:
        attribute.name = rng.choice(["axis", "body", "group", "to"])


def edit_operator(rng: random.Random, proto: Any) -> None:
    """Another operator, other inputs, another order."""
    import onnx

    node = rng.choice(proto.graph.node)
    how = rng.random()
    if how < 0.4:
        node.op_type = rng.choice([schema.name for schema in onnx.defs.get_all_schemas()])
    elif how < 0.7 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names(rng, proto))
    elif how < 0.8:
        node.domain = rng.choice(["com.microsoft", "ai.onnx.ml", "x"])
    elif how < 0.9:
        proto.graph.node.remove(node)
    else:
        proto.graph.node.append(node)


def edit_constant(rng: random.Random, proto: Any) -> None:
    """Another shape, type, place or value of a constant."""
    constant = rng.choice(proto.graph.initializer)
    how = rng.random()
    if how < 0.3 and constant.dims:
        constant.dims[rng.randrange(len(constant.dims))] = rng.choice(INTEGERS)
    elif how < 0.5:
        constant.data_type = rng.choice([0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 17, 21, 22, 99])
    elif how < 0.75 and constant.external_data:
        entry = rng.choice(constant.external_data)
        entry.value = rng.choice(
            ["0", "-1", "4", str(1 << 40), "", "x", "../../x", "*/_ORT_MEM_ADDR_/*", "manifest.json", "trunk.onnx"]
        )
    elif constant.raw_data:
        constant.raw_data = flip(rng, constant.raw_data)


def edit_type(rng: random.Random, proto: Any) -> None:
    """Another declared type or shape of an input or output."""
    value = rng.choice([*proto.graph.input, *proto.graph.output])
    tensor = value.type.tensor_type
    if rng.random() < 0.3:
        tensor.elem_type = rng.choice([1, 7, 8, 10, 16])
    elif tensor.shape.dim:
        tensor.shape.dim[rng.randrange(len(tensor.shape.dim))].dim_value = rng.choice(INTEGERS)


def names(rng: random.Random, proto: Any) -> list[str]:
    """Names of values in a graph."""
    graph = proto.graph
    return [
        *(v.name for v in graph.input),
        *(c.name for c in graph.initializer),
        *(n for node in graph.node for n in node.output),
        "",
    ]


def insert_node(rng: random.Random, proto: Any) -> None:
    """An operator of ONNX's two hundred, with inputs that are there and attributes of extreme values."""
    import onnx
    from onnx import helper

    schema = rng.choice(onnx.defs.get_all_schemas())
    there = names(rng, proto)
    inputs = [
        rng.choice(there) for _ in range(rng.randint(schema.min_input, min(schema.max_input, schema.min_input + 3)))
    ]
    attributes: dict[str, Any] = {}
    for name, attribute in schema.attributes.items():
        kind = int(attribute.type)  # AttributeProto.AttributeType
        value = {1: rng.choice([0.0, -1.0, 1e38]), 2: rng.choice(INTEGERS), 3: rng.choice(["", "SAME_UPPER", "linear"]),
                 6: [0.5], 7: [rng.choice(INTEGERS) for _ in range(rng.randint(1, 4))]}.get(kind)  # fmt: skip
        if value is not None and rng.random() < 0.7:
            attributes[name] = value
    node = helper.make_node(schema.name, inputs, [f"new{rng.random()}"], domain=schema.domain, **attributes)
    place = rng.randint(0, len(proto.graph.node))
    follower = proto.graph.node[place] if place < len(proto.graph.node) else None
    if follower is not None and follower.input and rng.random() < 0.7:  # or nobody needs it
        follower.input[0] = node.output[0]
    proto.graph.node.insert(place, node)


def insert_killer(rng: random.Random, proto: Any) -> None:
    """What is known to end, hang or fill an engine."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    value = graph.input[0].name

    def constant(name: str, *integers: int) -> str:
        name = f"{name}{rng.random()}"
        graph.initializer.append(numpy_helper.from_array(np.array(integers, np.int64), name))
        return name

    out = f"killer{rng.random()}"
    least, minus, zero = constant("least", -(1 << 63)), constant("minus", -1), constant("zero", 0)
    big = constant("big", *[1 << rng.choice([16, 24, 30, 40])] * rng.randint(1, 4))
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])], "b",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, [])],
    )  # fmt: skip
    nodes = rng.choice([
        [helper.make_node("Div", [least, minus], [out])],
        [helper.make_node("Mod", [least, minus], [out])],
        [helper.make_node("ConvTranspose", [value, value], [out], group=0)],
        [helper.make_node("Conv", [value, value], [out], group=0)],
        [helper.make_node("STFT", [value, zero, value], [out])],
        [helper.make_node("SplitToSequence", [value, zero], [out])],
        [helper.make_node("Attention", [value, value, value], [out], q_num_heads=0, kv_num_heads=0)],
        [helper.make_node("Loop", [constant("count", 1 << 60), "", ], [out], body=body)],
        [helper.make_node("Expand", [value, big], [out])],
        [helper.make_node("ConstantOfShape", [big], [out])],
        [helper.make_node("Tile", [value, big], [out])],
        [helper.make_node("Pad", [value, big], [out])],
        [helper.make_node("Reshape", [value, big], [out])],
        [helper.make_node("Range", [zero, big, minus], [out])],
        [helper.make_node("Concat", [value] * 300, [out], axis=0)],
        [helper.make_node("Relu", [value if i == 0 else f"{out}{i - 1}"], [f"{out}{i}"]) for i in range(rng.choice([100, 9000, 100_000]))],
        [helper.make_node("Concat", [value if i == 0 else f"{out}{i - 1}"] * 2, [f"{out}{i}"], axis=0) for i in range(60)],
        [helper.make_node("f", [value], [out], domain="own")],
    ])  # fmt: skip
    if nodes[0].domain == "own":
        call = helper.make_node("f", ["a"], ["b"], domain="own")
        proto.functions.append(helper.make_function("own", "f", ["a"], ["b"], [call], [helper.make_opsetid("own", 1)]))
        proto.opset_import.append(helper.make_opsetid("own", 1))
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)


def checkpoint_case(worker: Worker, rng: random.Random) -> str:
    """Bits of a checkpoint, which must not change a value; or its header's values, its checksums put right."""
    import torch

    from mvmoe_deploy import checkpoint, models

    suffix = rng.choice([".pt", ".safetensors"])
    original = worker.base / f"moe{suffix}"
    if suffix not in worker.models:
        worker.models[suffix] = checkpoint.load(original)
    before = worker.models[suffix]
    content, path = original.read_bytes(), worker.folder / f"damaged{suffix}"
    raw_damage = rng.random() < 0.5
    if raw_damage:
        path.write_bytes(flip(rng, content, 1 if rng.random() < 0.7 else 6))
    elif suffix == ".pt":
        path.write_bytes(pt_edit(rng, content))
    else:
        path.write_bytes(safetensors_edit(rng, content))
    after = checkpoint.load(path)
    if raw_damage:
        same = after.header == before.header and all(
            torch.equal(t, before.weights[n]) for n, t in after.weights.items()
        )
        if not same or after.weights.keys() != before.weights.keys():
            raise Wrong("a changed value was accepted")
        return "unchanged"
    models.load_model(after, str(path))
    return "accepted"


def pt_edit(rng: random.Random, content: bytes) -> bytes:
    """A .pt with other instructions in its pickle, and the right CRC-32 of them."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    how = rng.random()
    if how < 0.6:
        entries[name] = flip(rng, entries[name], 6)
    elif how < 0.8:
        entries[name] = pickle.dumps(rng.choice(ODD), rng.randint(0, 5))
    elif how < 0.9:
        entries.pop(rng.choice(list(entries)))
    else:
        other = rng.choice(list(entries))
        entries[other] = flip(rng, entries[other] or b"x")
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", rng.choice([0, 0, 0, zipfile.ZIP_DEFLATED])) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return result.getvalue()


def safetensors_edit(rng: random.Random, content: bytes) -> bytes:
    """A .safetensors with other values in its header, and the right sha256."""
    from mvmoe_deploy.tensor_files import PLACEHOLDER, seal

    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    own = json.loads(header["__metadata__"]["mvmoe"])
    for _ in range(rng.randint(1, 2)):
        edit(rng, rng.choice([own, header]))
    with contextlib.suppress(KeyError, TypeError):
        header["__metadata__"]["mvmoe"] = json.dumps(own)
        header["__metadata__"]["sha256"] = PLACEHOLDER
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + content[8 + length :]
    try:
        return seal(data)
    except AssertionError:  # its place was edited away
        return data


def image_case(worker: Worker, rng: random.Random) -> str:
    """An image in any format that Pillow writes, damaged or not."""
    import numpy as np
    from PIL import Image

    from mvmoe_deploy.images import Preprocessing, preprocess

    Image.init()
    size = rng.choice([(1, 1), (3, 5), (16, 16), (40, 30), (1, 200)])
    mode = rng.choice(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "F", "I;16", "HSV", "LAB"])
    name = rng.choice(sorted(set(Image.SAVE) - {"PDF"}))
    content = io.BytesIO()
    bands = rng.randbytes(size[0] * size[1] * 4 * 4)
    try:
        image = Image.frombytes(mode, size, bands[: len(Image.new(mode, size).tobytes())])
        options = {"save_all": True, "append_images": [image]} if name in Image.SAVE_ALL and rng.random() < 0.3 else {}
        image.save(content, name, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):  # not in this mode
        content = io.BytesIO()
        Image.frombytes("RGB", size, bands[: 3 * size[0] * size[1]]).convert("L" if rng.random() < 0.3 else "RGB").save(
            content, rng.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
        )
    data = content.getvalue()
    if rng.random() < 0.8:
        data = flip(rng, data, 8)
    source: Any = data
    if rng.random() < 0.3:
        source = worker.folder / "image"
        source.write_bytes(data)
    result = preprocess(source, Preprocessing(size=rng.choice([8, 32])))
    if result.dtype != np.float32 or result.shape[0] != 3 or not np.isfinite(result).all():
        raise Wrong(f"{result.dtype} {result.shape}")
    return "accepted"


def data_case(worker: Worker, rng: random.Random) -> str:
    """A folder or zip of classes with entries that do not belong there."""
    from mvmoe_deploy.images import Preprocessing
    from mvmoe_deploy.models.train.folders import read_class_names, read_images, read_superclasses

    root = worker.folder / "data"
    shutil.rmtree(root, ignore_errors=True)
    files = {f"n{c:04d}/{i}.png": (worker.base / "image.png").read_bytes() for c in range(3) for i in range(2)}
    names = list(files)
    for _ in range(rng.randint(0, 3)):
        name = rng.choice(names)
        files[rng.choice([name, f"n0001/images/{rng.randrange(9)}.png", "x.png", "n0009/x.txt", ".hidden/a.png", "n0002/a\x1b[31m.png",
                          "n0003/ü.jpg", f"{'d/' * 9}a.png", "n0000/.DS_Store", "val_annotations.txt"])] = flip(rng, files[name], 8)  # fmt: skip
    zipped = rng.random() < 0.5
    root.mkdir()
    if zipped:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", rng.choice([0, zipfile.ZIP_DEFLATED])) as archive:
            for name, content in files.items():
                archive.writestr(rng.choice([name] * 20 + [f"../{name}", f"/{name}", f"val/{name}"]), content)
        content = packed.getvalue()
        (root / "val.zip").write_bytes(flip(rng, content) if rng.random() < 0.5 else content)
    else:
        for name, content in files.items():
            path = root / "val" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    ids = [f"n{c:04d}" for c in range(3)]
    table = "".join(f"{i}\tgroup {c % 2}\n" for c, i in enumerate(ids)).encode()
    for name in ("classes.tsv", "groups.tsv"):
        (root / name).write_bytes(flip(rng, table, 6) if rng.random() < 0.7 else table)
    outcome = "refused"
    with_errors: list[Callable[[], object]] = [
        lambda: read_images(root, "val", Preprocessing(size=8)),
        lambda: read_class_names(root, ids),
        lambda: read_superclasses(root / "groups.tsv", ids),
    ]
    from mvmoe_deploy.errors import MvmoeError

    for read in with_errors:
        try:
            read()
            outcome = "accepted"
        except MvmoeError as error:
            if not str(error).isprintable():
                raise Wrong(f"message {str(error)[:200]!r}") from None
    return outcome


CASES: dict[str, Callable[[Worker, random.Random], str]] = {
    "manifest": manifest_case,
    "piece": piece_case,
    "checkpoint": checkpoint_case,
    "image": image_case,
    "data": data_case,
}


def serve(base: Path) -> None:
    """A worker: reads cases as lines, answers each with a line."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(base, Path(folder))
        for line in sys.stdin:
            kind, seed, number = line.split()
            answers.write(json.dumps(worker.run(kind, int(seed), int(number))) + "\n")


# The main process


def prepare(base: Path) -> None:
    """Writes what is damaged: bundles of three layouts, checkpoints, an image."""
    import tiny
    from PIL import Image

    from mvmoe_deploy import checkpoint
    from mvmoe_deploy.exporters import pipeline
    from mvmoe_deploy.exporters.exporter import Options

    model, dense = tiny.lively_model(tiny.moe_config()), tiny.lively_model(tiny.dense_config())
    for name, of, options in (
        ("fp32", model, Options()),
        ("fp16", model, Options(precision="fp16")),
        ("swappable", model, Options(layout="swappable")),
        ("dense", dense, Options()),
    ):
        pipeline.export_model(of, tiny.header_for(of.config), "onnx", base / f"{name}.mvmoe", options=options)
    for suffix in (".pt", ".safetensors"):
        checkpoint.save(base / f"moe{suffix}", tiny.checkpoint_of(model))
    Image.fromarray(tiny.images(1)[0]).save(base / "image.png")


class Process:
    """A worker as the main process sees it."""

    def __init__(self, base: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(base)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        self.case: tuple[str, int] | None = None
        self.since = 0.0

    @property
    def output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def give(self, kind: str, seed: int, number: int) -> None:
        assert self.process.stdin is not None
        self.case, self.since = (kind, number), time.monotonic()
        self.process.stdin.write(f"{kind} {seed} {number}\n")
        self.process.stdin.flush()

    def end(self) -> str:
        """Stops it, and says how it had ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill() if self.process.poll() is None else None
        code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit {code}"


def fuzz(base: Path, cases: list[tuple[str, int]], seed: int, workers: int) -> dict[str, Counter[str]]:
    """Runs cases; returns how they ended, by kind. Anything that is not as it should be begins with BAD."""
    results: dict[str, Counter[str]] = {kind: Counter() for kind in SHARES}
    left = iter(cases)
    selector = selectors.DefaultSelector()
    busy: list[Process] = []

    def start() -> None:
        process = Process(base)
        busy.append(process)
        selector.register(process.output, selectors.EVENT_READ, process)
        hand_out(process)

    def hand_out(process: Process) -> None:
        case = next(left, None)
        if case is None:
            drop(process)
        else:
            process.give(case[0], seed, case[1])

    def drop(process: Process) -> str:
        selector.unregister(process.output)
        busy.remove(process)
        return process.end()

    def record(process: Process, outcome: str) -> None:
        assert process.case is not None
        kind, number = process.case
        if outcome.startswith("BAD"):
            print(f"{kind} {number}: {outcome}", flush=True)
            outcome = " ".join(outcome.split()[:2]).rstrip(":")
        results[kind][outcome] += 1

    for _ in range(min(workers, len(cases))):
        start()
    while busy:
        for key, _ in selector.select(timeout=1):
            process = key.data
            line = process.output.readline()
            if line:
                record(process, json.loads(line))
                hand_out(process)
            else:
                record(process, f"BAD crash: {drop(process)}")
                start()
        for process in [each for each in busy if time.monotonic() - each.since > SECONDS + 40 * (each.case is None)]:
            drop(process)
            record(process, f"BAD hang: more than {SECONDS} s")
            start()
    return results


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 1 where something was not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=12_000, help="number of cases, of all kinds")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind")
    parser.add_argument("--only", choices=list(SHARES), help="cases of this kind alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        serve(args.worker)
        return 0
    shares = {args.only: 1.0} if args.only else SHARES
    cases = [(kind, args.first + i) for kind, share in shares.items() for i in range(round(share * args.cases))]
    random.Random(0).shuffle(cases)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        results = fuzz(Path(folder), cases, args.seed, args.workers)
    bad = 0
    for kind, outcomes in results.items():
        if outcomes:
            print(f"{kind}: " + ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())))
            bad += sum(count for outcome, count in outcomes.items() if outcome.startswith("BAD"))
    total = sum(sum(outcomes.values()) for outcomes in results.values())
    print(f"{total:,} inputs with seed {args.seed} in {time.monotonic() - started:.0f} s: {bad} not as they should be")
    return 1 if bad or total != len(cases) else 0


if __name__ == "__main__":
    raise SystemExit(main())
