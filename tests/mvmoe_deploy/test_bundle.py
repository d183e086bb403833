"""The bundle format: what is read is checked, and what is damaged, unsafe or absurd is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny

import mvmoe_deploy
from mvmoe_deploy import bundle as bundles
from mvmoe_deploy.bundle import Routing, expected_pieces, open_bundle, write_manifest
from mvmoe_deploy.errors import BackendError, BundleError

Edit = Callable[[dict[str, Any]], object]


def test_a_bundle_describes_itself(bundle_path: Path) -> None:
    manifest = open_bundle(bundle_path).manifest
    assert (manifest.format, manifest.version, manifest.target, manifest.precision) == (
        "mvmoe-bundle",
        5,
        "onnx",
        "fp32",
    )
    assert manifest.routing == Routing(4, 1, 1, "fused", "softmax")
    assert [piece.name for piece in manifest.pieces] == ["trunk", "expert_00", "expert_01", "expert_02", "expert_03"]
    assert [(expert.name, expert.classes) for expert in manifest.experts] == [
        ("group 0", [0, 4]), ("group 1", [1, 5]), ("group 2", [2]), ("group 3", [3])
    ]  # fmt: skip
    assert manifest.model == tiny.moe_config().to_dict()
    assert manifest.source.checkpoint == "moe.pt"
    assert {"mvmoe-deploy", "torch", "onnx", "onnxruntime"} <= set(manifest.tools)
    tail = manifest.pieces[1]
    assert [(spec.name, spec.shape, spec.dtype) for spec in [*tail.inputs, *tail.outputs]] == [
        ("tokens", ["batch", 17, 32], "float32"), ("gate", ["batch"], "float32"), ("logits", ["batch", 6], "float32"),
        ("top_probabilities", ["batch", 5], "float32"), ("top_classes", ["batch", 5], "int64"),
    ]  # fmt: skip


def test_every_file_is_in_the_manifest_and_every_hash_is_right(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    listed = {file.path for file in bundle.manifest.files}
    there = {str(file.relative_to(bundle_path)) for file in bundle_path.rglob("*")}
    assert there == listed | {"manifest.json", "manifest.sha256"}
    loaded = {path for piece in bundle.manifest.pieces for path in piece.files}
    assert listed == loaded | {"selftest.json"} | {path for path in listed if path.startswith("selftest_")}
    bundle.check()


def test_sha256sum_can_check_it(bundle_path: Path) -> None:
    """The manifest's hashes are those of the files' bytes, and of nothing else."""
    import hashlib

    for file in open_bundle(bundle_path).manifest.files:
        assert hashlib.sha256((bundle_path / file.path).read_bytes()).hexdigest() == file.sha256


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("k", "router"), [(1, "fused"), (1, "separate"), (2, "fused"), (2, "separate")])
def test_expected_pieces(k: int, router: Any, layers: int) -> None:
    names = expected_pieces(Routing(5, k, layers, router))
    assert len(names) == len(set(names))
    assert len(names) == 1 + (router == "separate") + (5 if k == 1 else layers * 6 + 1)


def test_no_such_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.mvmoe: no such bundle"):
        open_bundle(tmp_path / "none.mvmoe")
    with pytest.raises(BundleError, match="not a bundle"):
        open_bundle(tmp_path)
    file = tmp_path / "file.mvmoe"
    file.write_bytes(b"x")
    with pytest.raises(BundleError, match=r"file\.mvmoe: not a bundle"):
        open_bundle(file)


def test_a_piece_takes_little_memory(bundle_path: Path, tmp_path: Path) -> None:
    """What pieces have in common is kept once and was never held for all pieces at a time."""
    manifest = open_bundle(bundle_path).manifest
    paths = {file.path: file.path for file in manifest.files}
    for piece in manifest.pieces:
        assert piece.graph is paths[piece.graph] and all(path is paths[path] for path in piece.files)
    pieces = [msgspec.Raw(msgspec.json.encode(manifest.pieces[1]))] * 200
    tracemalloc.start()
    shared = bundles._shared(pieces, paths)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shared == [manifest.pieces[1]] * 200
    assert kept < 200 * 400 and most < kept + 10_000  # of each piece 1,400 bytes are read


def test_what_all_experts_take_and_return_is_held_once(bundle_path: Path) -> None:
    trunk, first, *others = open_bundle(bundle_path).manifest.pieces
    assert len(others) == 3 and trunk.inputs != first.inputs
    assert all(piece.inputs is first.inputs and piece.outputs is first.outputs for piece in others)


PIECE_FILES = ["trunk.onnx", "trunk.bin", "tail_shared.bin", "expert_02.onnx", "expert_02.bin"]


@pytest.mark.parametrize("name", PIECE_FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "altered", "directory"])
def test_a_damaged_file_is_named_and_nothing_is_run(
    bundle_copy: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bundle_copy / name
    content = file.read_bytes()
    if damage in ("missing", "directory"):
        file.unlink()
        if damage == "directory":
            file.mkdir()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "longer":
        file.write_bytes(content + b"\0")
    else:
        file.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: pytest.fail("loaded a piece"))
    with pytest.raises(BundleError, match=rf"{name}: (missing from the bundle|has \d+ bytes|sha256 differs)"):
        mvmoe_deploy.load(bundle_copy, check="all")


@pytest.mark.parametrize("worth_a_thread", [0, bundles.WORTH_A_THREAD], ids=["thread", "first"])
def test_a_damaged_expert_is_named_and_never_run(
    bundle_copy: Path, worth_a_thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts may arrive later; one that arrives damaged is not run, and the others still are."""
    monkeypatch.setattr(bundles, "WORTH_A_THREAD", worth_a_thread)
    file = bundle_copy / "expert_01.bin"
    content = file.read_bytes()
    file.unlink()
    with mvmoe_deploy.load(bundle_copy) as runtime:
        runtime.run(tiny.inputs(2).numpy(), [[0], [2]])
        with pytest.raises(BundleError, match=r"expert_01\.bin: missing"):
            runtime.run(tiny.inputs(1).numpy(), [[1]])
        file.write_bytes(content[:-1] + b"?")
        with pytest.raises(BundleError, match=r"expert_01\.bin: sha256 differs"):
            runtime.run(tiny.inputs(1).numpy(), [[1]])
        file.write_bytes(content)
        runtime.run(tiny.inputs(1).numpy(), [[1]])
        assert runtime.stats().resident == [0, 2, 1]


def test_files_are_compared_while_the_callers_block_runs(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "WORTH_A_THREAD", 0)
    content = bytearray((bundle_copy / "trunk.bin").read_bytes())
    with pytest.raises(ZeroDivisionError), open_bundle(bundle_copy).checking(["trunk.bin"]):
        raise ZeroDivisionError
    content[-1] ^= 1
    (bundle_copy / "trunk.bin").write_bytes(content)
    reached = []
    with (
        pytest.raises(BundleError, match=r"trunk\.bin: sha256 differs"),
        open_bundle(bundle_copy).checking(["trunk.bin"]),
    ):
        reached.append("block")
        raise ZeroDivisionError  # what damaged weights may lead to; the damage is what the caller hears of
    (bundle_copy / "trunk.bin").write_bytes(content[:-1])
    with (
        pytest.raises(BundleError, match=r"trunk\.bin: has \d+ bytes"),
        open_bundle(bundle_copy).checking(["trunk.bin"]),
    ):
        reached.append("a file of another size is never opened")
    with pytest.raises(BundleError, match=r"trunk\.bin: sha256 differs"):
        (bundle_copy / "trunk.bin").write_bytes(content)
        mvmoe_deploy.load(bundle_copy)
    assert reached == ["block"]


def test_a_bundle_in_a_hubs_cache_runs(bundle_path: Path, tmp_path: Path) -> None:
    """A folder of links into a store of files named by their hashes; what protects is that every file's is checked."""
    store, folder = tmp_path / "blobs", tmp_path / "snapshots" / "moe.mvmoe"
    store.mkdir()
    folder.mkdir(parents=True)
    for file in bundle_path.iterdir():
        shutil.copy(file, store / bundles.sha256(file))
        (folder / file.name).symlink_to(Path("../../blobs") / bundles.sha256(file))
    image = tiny.images(1)[0]
    with mvmoe_deploy.load(folder) as runtime, mvmoe_deploy.load(bundle_path) as plain:
        assert runtime.predict(image).top == plain.predict(image).top
    with open((folder / "expert_01.bin").resolve(), "r+b") as blob:
        blob.write(b"other")
    with pytest.raises(BundleError, match=r"expert_01\.bin: sha256 differs"):
        mvmoe_deploy.load(folder, check="all")


@pytest.mark.parametrize("target", ["/etc/hostname", "/dev/zero", "/"])
def test_a_link_to_something_else_is_refused(bundle_copy: Path, target: str) -> None:
    (bundle_copy / "trunk.bin").unlink()
    (bundle_copy / "trunk.bin").symlink_to(target)
    with pytest.raises(BundleError, match=r"trunk\.bin: (has \d+ bytes, manifest|missing)"):
        mvmoe_deploy.load(bundle_copy)


def test_a_folder_that_leads_out_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    """Although what lies in it has the right bytes."""
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(bundle_copy / "trunk.bin", outside / "trunk.bin")
    (bundle_copy / "sub").symlink_to(outside)

    def edit(manifest: dict[str, Any]) -> None:
        text = json.dumps(manifest).replace('"trunk.bin"', '"sub/trunk.bin"')
        manifest.update(json.loads(text))

    tiny.edit_manifest(bundle_copy, edit)
    with pytest.raises(BundleError, match=r"trunk\.bin: lies in a folder that is a link out of the bundle"):
        mvmoe_deploy.load(bundle_copy)


def test_a_zip_of_a_bundle_is_told_apart(bundle_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.make_archive(str(tmp_path / "moe.mvmoe"), "zip", bundle_path))
    with pytest.raises(BundleError, match=r"moe\.mvmoe\.zip: not a bundle \(a zip of one: unpack it\)"):
        open_bundle(path)
    path.rename(tmp_path / "moe.pt")  # which is a zip as well
    with pytest.raises(
        BundleError, match=r"moe\.pt: not a bundle \(a checkpoint, perhaps: mvmoe-export makes a bundle"
    ):
        open_bundle(tmp_path / "moe.pt")
    path.write_bytes(b"something else")
    with pytest.raises(BundleError, match=r"not a bundle \(a directory with a manifest\.json\)"):
        open_bundle(path)


def test_a_bundle_reached_through_a_symlink_is_fine(bundle_path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.mvmoe"
    link.symlink_to(bundle_path)
    open_bundle(link).check()


def test_a_graph_that_names_weights_outside_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    """A stranger's graph, hashes and all: onnxruntime itself must not follow its path out of the bundle."""
    import onnx

    graph = onnx.load(bundle_copy / "trunk.onnx", load_external_data=False)
    shutil.copy(bundle_copy / "trunk.bin", tmp_path / "secret.bin")
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret.bin"
    onnx.save(graph, bundle_copy / "trunk.onnx")
    tiny.rehash(bundle_copy)
    with pytest.raises(
        BackendError, match=r"trunk\.onnx: refused, constant .* lies in '\.\./secret\.bin', which manif"
    ):
        mvmoe_deploy.load(bundle_copy)
    with pytest.raises(BackendError, match=r"trunk\.onnx: onnxruntime .* cannot load it"):
        mvmoe_deploy.load(bundle_copy, trust=True)


def test_a_bundle_of_the_first_format_version_is_read(bundle_copy: Path) -> None:
    """Version 1's pieces have none of the fields that version 2 added, and their graphs rank no classes."""
    import onnx

    def edit(manifest: dict[str, Any]) -> None:
        manifest["version"] = 1
        for piece in manifest["pieces"]:
            for name in ("optimised", "weights", "shared_bytes"):
                del piece[name]
            piece["outputs"] = [spec for spec in piece["outputs"] if not spec["name"].startswith("top_")]
            graph = onnx.load(bundle_copy / piece["graph"], load_external_data=False)
            for value in [v for v in graph.graph.output if v.name.startswith("top_")]:
                graph.graph.output.remove(value)
            onnx.save(graph, bundle_copy / piece["graph"])

    image = tiny.images(1)[0]
    with mvmoe_deploy.load(bundle_copy) as runtime:
        expected = runtime.predict(image).top
    tiny.edit_manifest(bundle_copy, edit)
    tiny.rehash(bundle_copy)
    with mvmoe_deploy.load(bundle_copy) as runtime:
        top = runtime.predict(image).top
    assert [score.label for score in top] == [score.label for score in expected]
    assert [s.probability for s in top] == pytest.approx([s.probability for s in expected], abs=1e-6)


UNSAFE = [
    "../trunk.onnx", "a/../../trunk.onnx", "/etc/passwd", "//host/share", "..", ".", "", "a//b", "./trunk.onnx",
    "..\\trunk.onnx", "C:\\trunk.onnx", "C:trunk.onnx", "trunk.onnx\0", "a\nb",
]  # fmt: skip


@pytest.mark.parametrize("path", UNSAFE)
@pytest.mark.parametrize("where", ["files", "graph"])
def test_a_path_that_leads_out_is_refused(bundle_copy: Path, path: str, where: str) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        piece = manifest["pieces"][0]
        if where == "files":
            manifest["files"].append({**manifest["files"][0], "path": path})
            piece["files"].append(path)
        else:
            piece["graph"] = path

    tiny.edit_manifest(bundle_copy, edit)
    with pytest.raises(BundleError, match=r"manifest\.json: path .* may lead outside the bundle"):
        open_bundle(bundle_copy)


def put(*keys: str | int, value: Any) -> Edit:
    """Sets ``manifest[key]…[key] = value``."""

    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit


def drop(*keys: str | int) -> Edit:
    def edit(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return edit


def absurd_routing(manifest: dict[str, Any]) -> None:
    """Valid field by field; all its pieces' names together would take a terabyte."""
    manifest["routing"].update(experts=65535, k=2, moe_layers=65535)
    manifest["experts"] = [{"name": "", "classes": []}] * 65535
    manifest["pieces"][0]["outputs"][1]["shape"][1] = 65535


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("format"), "not a manifest of this project"),
        (put("format", value="zip"), "not a manifest of this project"),
        (put("version", value=6), "format version '6', this release reads 1, 2, 3, 4 and 5"),
        (put("version", value=True), r"Expected `int`"),
        (put("version", value="1"), "format version '1'"),
        (drop("version"), "format version 'None'"),
        (put("target", value="tflite"), "unknown target 'tflite': expected one of onnx, executorch, coreml"),
        (put("colour", value=1), "unknown field `colour`"),
        (put("pieces", 0, "colour", value=1), "unknown field `colour`"),
        (put("routing", "colour", value=1), "unknown field `colour`"),
        (drop("pieces"), "missing required field `pieces`"),
        (drop("routing"), "missing required field `routing`"),
        (put("pieces", value={}), r"\$\.pieces"),
        (put("files", 0, "sha256", value="abc"), r"\$\.files\[0\]\.sha256"),
        (put("files", 0, "bytes", value=-1), r"\$\.files\[0\]\.bytes"),
        (put("files", 0, "bytes", value=1 << 60), r"\$\.files\[0\]\.bytes"),
        (put("files", 0, "bytes", value=10**30), r"\$\.files\[0\]\.bytes"),
        (put("pieces", 0, "weight_bytes", value=-5), r"weight_bytes"),
        (put("pieces", 0, "weight_bytes", value=1 << 51), r"weight_bytes"),
        (put("pieces", 0, "inputs", 0, "shape", 1, value=1 << 40), r"inputs\[0\]\.shape"),
        (put("pieces", 0, "inputs", 0, "shape", 1, value=0), r"inputs\[0\]\.shape"),
        (put("preprocessing", "size", value=10**6), r"\$\.preprocessing\.size"),
        (put("preprocessing", "size", value=64), r"piece trunk: images is \[3, 32, 32\]"),
        (put("preprocessing", "mean", value=[0.5, 0.5]), r"\$\.preprocessing\.mean"),
        (put("routing", "experts", value=10**9), r"\$\.routing\.experts"),
        (put("routing", "experts", value=5), r"probabilities is \[4\], the rest says \[5\]"),
        (put("routing", "k", value=0), r"\$\.routing\.k"),
        (put("routing", "k", value=5), "k is 5, but there are only 4 experts"),
        (put("routing", "k", value=2), "pieces do not fit the routing"),
        (put("routing", "gate", value="sigmoid"), r"\$\.routing\.gate"),
        (put("routing", value=None), "probabilities is"),
        (absurd_routing, "pieces do not fit the routing"),
        (put("experts", 0, "classes", value=[6]), "an expert names a class that does not exist"),
        (drop("experts", 0), "describes 3 experts, routing has 4"),
        (drop("class_ids", 0), "5 class_ids but 6 class_names"),
        (
            lambda m: (
                m["class_ids"].pop(),
                m["class_names"].pop(),
                put("experts", value=[{"name": "", "classes": []}] * 4)(m),
            ),
            r"expert_00: logits is \[6\]",
        ),
        (drop("pieces", 2), "pieces do not fit the routing: lacks expert_01"),
        (lambda m: m["pieces"].append(m["pieces"][2]), "pieces do not fit the routing: there are too many"),
        (put("pieces", 2, "expert", value=0), "lacks expert_01"),
        (put("pieces", 0, "files", value=[]), "piece trunk uses no file"),
        (put("pieces", 0, "files", value=["trunk.bin"]), "does not list its graph"),
        (lambda m: m["pieces"][0]["files"].append("other.bin"), r"uses other\.bin, which is not among the files"),
        (lambda m: m["files"].append(m["files"][0]), "lists a file twice"),
        (drop("pieces", 1, "expert"), "a piece of role tail has no expert"),
        (put("pieces", 1, "expert", value=None), "a piece of role tail has no expert"),
        (put("pieces", 0, "expert", value=0), "a piece of role trunk names its expert"),
        (put("pieces", 1, "layer", value=0), "a piece of role tail names its layer"),
        (put("pieces", 0, "role", value="attention"), "a piece of role attention has no layer"),
        (put("files", 0, "path", value="a" * 300), "is longer than a file's name can be"),
        (put("files", 0, "path", value="ü" * 200), "is longer than a file's name can be"),
        (put("files", 0, "path", value="a/" * 3000 + "a"), r"\$\.files\[0\]\.path"),
        (put("pieces", 0, "inputs", 0, "shape", value=[1] * 9), r"\$\.pieces\[0\]\.inputs\[0\]\.shape"),
        (put("pieces", 1, "inputs", 0, "shape", value=[]), "has 2 inputs, or one without a shape"),
        (drop("pieces", 0, "outputs", 1), "piece trunk: has 1 outputs, .* a trunk has 2"),
        (drop("pieces", 1, "outputs", 1), "piece expert_00: has 2 outputs, .* a tail has 1 or 3"),
        (drop("pieces", 1, "inputs", 1), "piece expert_00: has 1 inputs"),
        (lambda m: m["pieces"][1]["outputs"].reverse(), r"piece expert_00: its logits are \[5\], there are 6 classes"),
        (put("pieces", 1, "outputs", 1, "shape", value=["batch", 7]), "ranks .* of 6 classes"),
        (put("pieces", 1, "outputs", 2, "dtype", value="float32"), "its types are not float32, float32, int64"),
        (put("pieces", 0, "inputs", 0, "dtype", value="uint8"), "or an input is not float32"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_and_says_where(bundle_copy: Path, edit: Edit, message: str) -> None:
    tiny.edit_manifest(bundle_copy, edit)
    with pytest.raises(BundleError, match=rf"manifest\.json: .*{message}"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"format": "mvmoe-bundle"', b"[" * 100_000, b"PK\x03\x04"]
)
def test_a_manifest_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json: (damaged|not a manifest)"):
        open_bundle(tmp_path)


# the manifest's own sha256


def test_sha256sum_can_check_the_manifest(bundle_path: Path) -> None:
    import hashlib

    bundle = open_bundle(bundle_path)
    assert bundle.digest == hashlib.sha256((bundle_path / "manifest.json").read_bytes()).hexdigest()
    assert (bundle_path / "manifest.sha256").read_bytes() == f"{bundle.digest}  manifest.json\n".encode()
    done = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=bundle_path, capture_output=True, text=True)
    assert done.stdout == "manifest.json: OK\n"


def test_no_single_flipped_bit_of_a_manifest_is_accepted(bundle_copy: Path) -> None:
    file = bundle_copy / "manifest.json"
    content = file.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 700)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"manifest\.json: sha256 differs from manifest\.sha256"):
            open_bundle(bundle_copy)
    file.write_bytes(content)
    open_bundle(bundle_copy)


def test_an_edit_says_how_to_mean_it(bundle_copy: Path) -> None:
    file = bundle_copy / "manifest.json"
    file.write_text(file.read_text().replace("thing 0", "a bird"))
    with pytest.raises(BundleError, match=r"run: sha256sum manifest\.json > manifest\.sha256\)"):
        open_bundle(bundle_copy)
    with open(bundle_copy / "manifest.sha256", "wb") as record:
        subprocess.run(["sha256sum", "manifest.json"], cwd=bundle_copy, stdout=record, check=True)
    assert open_bundle(bundle_copy).manifest.class_names[0] == "a bird"


@pytest.mark.parametrize("content", [b"", b"0" * 64, b"0" * 64 + b"  manifest.json\n", b"\xff" * 100, bytes(2000)])
def test_a_damaged_record_of_the_sha256(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / "manifest.sha256").write_bytes(content)
    with pytest.raises(BundleError, match=r"sha256 differs from manifest\.sha256"):
        open_bundle(bundle_copy)


def test_the_record_may_be_missing_from_old_bundles_alone(bundle_copy: Path) -> None:
    (bundle_copy / "manifest.sha256").unlink()
    with pytest.raises(BundleError, match=r"manifest\.sha256: missing from the bundle"):
        open_bundle(bundle_copy)
    tiny.edit_manifest(bundle_copy, lambda manifest: manifest.update(version=2))
    (bundle_copy / "manifest.sha256").unlink()
    open_bundle(bundle_copy)


def test_an_app_can_pin_its_bundle(bundle_copy: Path) -> None:
    digest = open_bundle(bundle_copy).digest
    assert not open_bundle(bundle_copy).trusted
    assert open_bundle(bundle_copy, digest=digest.upper()).trusted
    tiny.edit_manifest(bundle_copy, lambda manifest: manifest["class_names"].reverse())
    with pytest.raises(BundleError, match=rf"manifest\.json: has sha256 [0-9a-f]{{64}}, but {digest} is asked for"):
        mvmoe_deploy.load(bundle_copy, digest=digest)


def test_paths_that_no_system_can_open(tmp_path: Path) -> None:
    for path in ("x" * 5000, "a\0b"):
        with pytest.raises(BundleError, match=r"cannot be read|no such bundle"):
            open_bundle(path)


def test_a_file_that_leads_in_a_circle(bundle_copy: Path) -> None:
    (bundle_copy / "trunk.bin").unlink()
    (bundle_copy / "trunk.bin").symlink_to("trunk.bin")
    with pytest.raises(BundleError, match=r"trunk\.bin: (missing|cannot be read)"):
        open_bundle(bundle_copy).check()


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(bundles.MAX_MANIFEST_BYTES + 1)  # sparse
    with pytest.raises(BundleError, match="is larger than 32 MB"):
        open_bundle(tmp_path)


def test_an_inconsistent_manifest_is_not_written_either(bundle_path: Path, tmp_path: Path) -> None:
    import msgspec

    manifest = open_bundle(bundle_path).manifest
    with pytest.raises(BundleError):
        write_manifest(tmp_path, msgspec.structs.replace(manifest, pieces=manifest.pieces[1:]))
    assert not list(tmp_path.iterdir())


def test_asking_for_a_piece_that_is_not_there(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    assert bundle.piece("tail", 3).name == "expert_03"
    with pytest.raises(BundleError, match="has no piece expert_04"):
        bundle.piece("tail", 4)
    with pytest.raises(BundleError, match="has no piece head"):
        bundle.piece("head")
