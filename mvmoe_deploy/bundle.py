"""The bundle: a directory with ``manifest.json``, graphs and weights, checked before anything in it is run."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from mvmoe_deploy import targets
from mvmoe_deploy.errors import BundleError, ConfigError, first_line
from mvmoe_deploy.images import Preprocessing

FORMAT = "mvmoe-bundle"
VERSION = 5
READABLE = (1, 2, 3, 4, 5)
"""Format versions that this release reads. Version 2 added ``optimised``, ``weights`` and ``shared_bytes`` to pieces,
and ranked classes to their outputs; version 3 added ``manifest.sha256``; version 4 added ``selftest``;
version 5 added ``dtype`` to weights, and a batch of 1 in place of a dynamic one."""

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
"""File with the manifest's sha256, in one line as ``sha256sum manifest.json`` prints it. It protects the manifest as
the manifest protects all other files."""
IMAGES, TOKENS, PROBABILITIES, GATE, LOGITS = "images", "tokens", "probabilities", "gate", "logits"
"""Names of the tensors that pass between the application and the pieces."""

WEIGHT_ALIGNMENT = 64
"""Alignment of weights in their file, in bytes, for vector loads from a mapped file."""

WORTH_A_THREAD = 1 << 20
"""Bytes from which on a sha256, at half a millisecond a megabyte, is computed while an engine loads the file."""

MAX_MANIFEST_BYTES = 32 << 20
MAX_NAME_BYTES = 255
"""Longest name of a file or folder that all common file systems allow, in bytes."""

Role = Literal["model", "trunk", "router", "tail", "attention", "expert_layer", "head"]
Index = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Extent = Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]


# A manifest of many experts has thousands of small structs. The garbage collector need not look at them (gc=False),
# because none of them can be part of a cycle.


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """An input or output of a piece; a dimension is a number or, if it is dynamic, a name (``batch``)."""

    name: str
    shape: Annotated[list[Extent | str], msgspec.Meta(max_length=8)]
    dtype: str


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A file of the bundle; its path is relative to the bundle, with forward slashes."""

    path: Annotated[str, msgspec.Meta(max_length=1024)]
    bytes: Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """A weight that a graph takes as an input, little-endian and in C order in a file of the bundle."""

    name: str
    shape: Annotated[list[Extent], msgspec.Meta(max_length=8)]
    file: str
    offset: Count
    dtype: Literal["float32", "int8", "uint8"] = "float32"

    @property
    def bytes(self) -> int:
        """The weight's size in bytes."""
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 1)

    def read(self, directory: Path) -> NDArray[Any]:
        """The weight's values, from its file in the bundle's directory."""
        kind = np.dtype(self.dtype).newbyteorder("<")
        return np.fromfile(directory / self.file, kind, math.prod(self.shape), offset=self.offset).reshape(self.shape)


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One exported graph.

    Attributes:
        role: ``model`` (a dense baseline, whole), ``trunk``, ``router``, ``tail``; for k > 1 the per-layer
            segments ``attention``, ``expert_layer`` and ``head`` in place of tails.
        expert: which expert a ``tail`` or ``expert_layer`` belongs to.
        layer: which MoE layer (from 0) an ``attention`` or ``expert_layer`` belongs to.
        graph: the file or package to open.
        function: the method or function in ``graph``, if that holds several.
        files: every file that loading the piece reads, including ``graph``.
        inputs: the inputs, in calling order.
        outputs: the outputs, in the order returned.
        parameters: number of weights that the piece uses.
        weight_bytes: size of these weights when loaded, which is what the memory budget counts; for a swappable piece,
            the size of its own weights only.
        flops: FLOPs for one image, counting a multiply-add as two; null if no closed form is known.
        optimised: whether the graph is already optimised, so that the engine need not optimise it when loading.
        weights: further inputs of the graph, which are the same in every call (``swappable`` layout).
        shared_bytes: size of the weights that stay loaded with the one graph of all swappable pieces.
    """

    role: Role
    graph: str
    files: list[str]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    parameters: Count
    weight_bytes: Count
    flops: Count | None
    expert: Index | None = None
    layer: Index | None = None
    function: str | None = None
    optimised: bool = False
    weights: list[Weight] = []
    shared_bytes: Count = 0

    @property
    def name(self) -> str:
        """The piece's name, such as ``trunk``, ``expert_03``, ``expert_03_layer_1``, ``attention_1``."""
        return piece_name(self.role, self.expert, self.layer)


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How images are routed.

    Attributes:
        experts: number of experts E.
        k: experts per image.
        moe_layers: number of MoE layers L.
        router: ``fused`` into the trunk, which then also returns probabilities, or a ``separate`` piece.
        gate: what multiplies an expert's output.
    """

    experts: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    k: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    moe_layers: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    router: Literal["fused", "separate"]
    gate: Literal["softmax"] = "softmax"


class Expert(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What an expert is for: its super-class's name and the indices of the classes in it; empty if not known."""

    name: str
    classes: list[Index]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint that a bundle was made from."""

    checkpoint: str
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``manifest.json``.

    Attributes:
        format: always ``mvmoe-bundle``.
        version: format version.
        target: export format of the pieces; one of :func:`mvmoe_deploy.targets.known`.
        layout: how pieces are laid out in files: ``separate``, ``packed`` or ``swappable``.
        precision: precision of the stored weights.
        model: model config, with its ``architecture``.
        routing: how images are routed; None for a dense model.
        preprocessing: how images become the model's input.
        class_ids: identifier of each class, in the order of the logits.
        class_names: readable name of each class, in the order of the logits.
        experts: what each expert is for, in expert order.
        files: every file of the bundle except the manifest and its sha256.
        pieces: the exported graphs.
        verification: what was checked against PyTorch, and the errors seen.
        source: the checkpoint that the bundle was made from.
        tools: versions of the tools that made the bundle.
        options: target-specific export options.
        selftest: the file with images and the answers expected of them, which show whether a device answers as it
            should; null for a bundle without them.
    """

    format: str
    version: int
    target: str
    layout: str
    precision: str
    model: dict[str, Any]
    routing: Routing | None
    preprocessing: Preprocessing
    class_ids: list[str]
    class_names: list[str]
    experts: list[Expert]
    files: list[File]
    pieces: list[Piece]
    verification: dict[str, Any]
    source: Source
    tools: dict[str, str]
    options: dict[str, Any] = {}
    selftest: str | None = None


def piece_name(role: str, expert: int | None = None, layer: int | None = None) -> str:
    """The name of a piece, which its files and reports carry."""
    if role in ("tail", "expert_layer"):
        name = f"expert_{expert:02d}"
        return name if role == "tail" else f"{name}_layer_{layer}"
    return f"attention_{layer}" if role == "attention" else role


class Bundle(msgspec.Struct, frozen=True, eq=False):
    """An opened bundle: its manifest is valid and consistent; :meth:`check` checks its files.

    Attributes:
        path: the bundle's directory.
        manifest: the content of ``manifest.json``.
        digest: sha256 of the bytes of ``manifest.json``. It identifies the whole bundle, because the manifest has the
            sha256 of every other file. Empty before the manifest is written.
        trusted: whether the caller vouches for the bundle or has named its digest, so that graphs need not be checked.
    """

    path: Path
    manifest: Manifest
    digest: str = ""
    trusted: bool = False
    _checked: set[str] = msgspec.field(default_factory=set)
    _places: dict[tuple[str, int | None, int | None], Piece] = msgspec.field(default_factory=dict)

    def pieces(self, role: Role) -> list[Piece]:
        """All pieces of a role, in the manifest's order."""
        return [piece for piece in self.manifest.pieces if piece.role == role]

    def piece(self, role: Role, expert: int | None = None, layer: int | None = None) -> Piece:
        """The one piece of that role, expert and layer.

        Raises:
            BundleError: there is no such piece.
        """
        if not self._places:
            self._places.update({(p.role, p.expert, p.layer): p for p in self.manifest.pieces})
        piece = self._places.get((role, expert, layer))
        if piece is not None:
            return piece
        raise BundleError(f"{self.path}: has no piece {piece_name(role, expert, layer)}")

    def check(self, paths: list[str] | None = None) -> None:
        """Compares files with the manifest's sizes and sha256; this object compares each file only once.

        Args:
            paths: the files to compare; all by default.

        Raises:
            BundleError: a file is missing, outside the bundle, of another size, or altered; the message names it.
        """
        for file in self._unchecked([file.path for file in self.manifest.files] if paths is None else paths):
            check_file(self.path, file)
            self._checked.add(file.path)

    @contextlib.contextmanager
    def checking(self, paths: list[str]) -> Iterator[None]:
        """Compares files as :meth:`check` does, but their sha256 while the caller's block runs, in another thread.

        Existence and sizes are compared before. The block must not use the files' content in a way that damaged content
        could harm.

        Raises:
            BundleError: see :meth:`check`; at the block's end, and in place of an error that the block itself raises.
        """
        files = self._unchecked(paths)
        if sum(file.bytes for file in files) < WORTH_A_THREAD:
            self.check(paths)
            yield
            return
        for file in files:
            locate_file(self.path, file)
        found: list[BundleError] = []

        def compare() -> None:
            try:
                for file in files:
                    compare_file(self.path, file)
                    self._checked.add(file.path)
            except BundleError as error:
                found.append(error)

        thread = threading.Thread(target=compare, name="mvmoe-check", daemon=True)
        thread.start()
        try:
            yield
        finally:
            thread.join()
            if found:
                raise found[0] from None

    def _unchecked(self, paths: list[str]) -> list[File]:
        wanted = set(paths) - self._checked
        return [file for file in self.manifest.files if file.path in wanted] if wanted else []


def open_bundle(path: str | Path, *, digest: str | None = None, trust: bool = False) -> Bundle:
    """Reads and checks a bundle's manifest and its sha256; no other file is opened.

    Args:
        path: the bundle's directory.
        digest: sha256 that its ``manifest.json`` must have, if the caller knows it; the bundle is then trusted.
        trust: whether the caller vouches for the bundle; see :class:`Bundle`.

    Raises:
        BundleError: there is no bundle, it has another digest, or its manifest is damaged, edited, unsafe or of another
            version.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        if not path.exists():
            raise BundleError(f"{path}: no such bundle")
        if not file.is_file():
            raise BundleError(f"{path}: not a bundle ({_what_instead(path)})")
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{file}: is larger than {MAX_MANIFEST_BYTES >> 20} MB; not a manifest")
        data = file.read_bytes()
        recorded = _recorded_digest(path)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise BundleError(f"{path}: cannot be read ({first_line(error)})") from None
    found = hashlib.sha256(data).hexdigest()
    if digest is not None and found != digest.lower():
        raise BundleError(f"{file}: has sha256 {found}, but {digest} is asked for; it is another bundle, or damaged")
    if recorded is not None and found != recorded:
        raise BundleError(
            f"{file}: sha256 differs from {MANIFEST_DIGEST}; the file is damaged, export again (after an intended "
            f"edit, run: sha256sum {MANIFEST} > {MANIFEST_DIGEST})"
        )
    manifest = _decoded(data, file)
    if recorded is None and manifest.version > 2:
        raise BundleError(f"{path / MANIFEST_DIGEST}: missing from the bundle; copy it again or export again")
    problem = _inconsistency(manifest)
    if problem:
        raise BundleError(f"{file}: {problem}")
    return Bundle(path, manifest, found, trust or digest is not None)


def _decoded(data: bytes, file: Path) -> Manifest:
    """The manifest in the bytes of ``file``, if it fits the schema.

    Raises:
        BundleError: the bytes are no manifest, or one of another version.
    """
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # straight into its type, without a dict of everything, and the pieces one by one
        unread = msgspec.json.decode(data, type=_Unread)
        if unread.format == FORMAT and unread.version in READABLE:
            pieces = _shared(unread.pieces, {file.path: file.path for file in unread.files})
            return Manifest(**{**msgspec.structs.asdict(unread), "pieces": pieces})
    # Something is wrong. What it is depends on the format and the version, so these are looked at before the rest.
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{file}: damaged ({first_line(error)}); export again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise BundleError(f"{file}: not a manifest of this project (no format: {FORMAT!r})")
    if raw.get("version") not in READABLE:
        readable = f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}"
        version = str(raw.get("version"))[:20]
        raise BundleError(f"{file}: format version {version!r}, this release reads {readable}; export again")
    try:
        return msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{file}: {first_line(error)}") from None


class _Unread(Manifest, frozen=True, forbid_unknown_fields=True):
    """A manifest whose pieces are not yet read."""

    pieces: list[msgspec.Raw]  # type: ignore[assignment]


def _shared(unread: list[msgspec.Raw], paths: dict[str, str]) -> list[Piece]:
    """Reads the pieces, which are most of a manifest of many experts; what they have in common is kept once.

    What successive pieces have in common, inputs and outputs above all, is three quarters of what an expert takes. It
    is dropped at once: memory that was once taken for all pieces would stay with the process.

    Args:
        unread: the pieces.
        paths: the paths of all files, by themselves.
    """
    decoder = msgspec.json.Decoder(Piece)
    pieces: list[Piece] = []
    for raw in unread:
        piece = decoder.decode(raw)
        msgspec.structs.force_setattr(piece, "graph", paths.get(piece.graph, piece.graph))
        msgspec.structs.force_setattr(piece, "files", [paths.get(path, path) for path in piece.files])
        for name in piece.__struct_fields__ if pieces else ():
            before = getattr(pieces[-1], name)
            if getattr(piece, name) == before:
                msgspec.structs.force_setattr(piece, name, before)
        pieces.append(piece)
    return pieces


def _recorded_digest(path: Path) -> str | None:
    """The digest in ``manifest.sha256``; None if the file is missing, empty if its content has another form."""
    file = path / MANIFEST_DIGEST
    if not file.exists():
        return None
    if not file.is_file() or file.stat().st_size > 1024:
        return ""
    match = re.fullmatch(rb"([0-9a-f]{64}) [ *]manifest\.json\r?\n?", file.read_bytes())
    return match[1].decode() if match else ""


def _what_instead(path: Path) -> str:
    """What a path that is no bundle may be, and what to do about it."""
    if path.is_file() and path.suffix in (".pt", ".safetensors"):
        return "a checkpoint, perhaps: mvmoe-export makes a bundle of one"
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return "a zip of one: unpack it"
    return f"a directory with a {MANIFEST}"


def is_bundle(path: Path) -> bool:
    """Whether a directory is a bundle, even a damaged one or one of another version.

    A ``manifest.json`` alone does not make a bundle, since other programs have files of that name.
    """
    try:
        raw = msgspec.json.decode((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def describe_files(directory: Path, paths: list[str]) -> list[File]:
    """The manifest entries (size, sha256) of files that were just written into a bundle."""
    return [File(path, (directory / path).stat().st_size, sha256(directory / path)) for path in paths]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json``, indented for a text editor, and ``manifest.sha256``.

    Raises:
        BundleError: the manifest is unsafe or inconsistent, so it could not be read back.
    """
    problem = _inconsistency(manifest)
    if problem:
        raise BundleError(f"{directory}: {problem}")
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    (directory / MANIFEST).write_bytes(data)
    (directory / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n", newline="\n")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(directory: Path, file: File) -> None:
    """Compares one file with its manifest entry.

    Raises:
        BundleError: the file is missing, outside the bundle, of another size, altered, or not readable.
    """
    locate_file(directory, file)
    compare_file(directory, file)


def compare_file(directory: Path, file: File) -> None:
    """Compares one file's content with its manifest entry; :func:`locate_file` compares the rest.

    Raises:
        BundleError: the file is altered, or not readable.
    """
    path = directory / file.path
    try:
        found = sha256(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({first_line(error)})") from None
    if found != file.sha256:
        raise BundleError(f"{path}: sha256 differs from {MANIFEST}; the file is damaged, export again")


def locate_file(directory: Path, file: File) -> None:
    """Compares everything but one file's content with its manifest entry.

    Raises:
        BundleError: the file is missing, outside the bundle, or of another size.
    """
    path = directory / file.path
    try:
        if not path.is_file():
            raise BundleError(f"{path}: missing from the bundle; export again or copy it again")
        # A file that is a link is fine: hubs keep files in a store beside their folders, and its sha256 is checked here
        if not path.parent.resolve().is_relative_to(directory.resolve()):
            raise BundleError(f"{path}: lies in a folder that is a link out of the bundle; copy the bundle")
        size = path.stat().st_size
        if size != file.bytes:
            raise BundleError(
                f"{path}: has {size} bytes, {MANIFEST} says {file.bytes}; the file is damaged, export again"
            )
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise BundleError(f"{path}: cannot be read ({first_line(error)})") from None


_UNSAFE = re.compile(r"[\\:\x00-\x1f]")


def _unsafe(path: str) -> bool:
    """Whether a manifest's path could lead out of the bundle, on any operating system."""
    return not {"", ".", ".."}.isdisjoint(path.split("/")) or bool(_UNSAFE.search(path))


def _inconsistency(manifest: Manifest) -> str | None:
    """What is inconsistent in a manifest that fits the schema; None if nothing is."""
    try:
        targets.get(manifest.target)
    except ConfigError as error:
        return str(error)
    sizes = {file.path: file.bytes for file in manifest.files}
    for path in {**sizes, **dict.fromkeys(piece.graph for piece in manifest.pieces)}:
        if _unsafe(path):
            return f"path {path[:200]!r} may lead outside the bundle"
        if any(len(part.encode()) > MAX_NAME_BYTES for part in path.split("/")):
            return f"path {path[:60] + '…'!r} is longer than a file's name can be"
    if len(sizes) != len(manifest.files):
        return "lists a file twice"
    if manifest.selftest is not None and manifest.selftest not in sizes:
        return f"its self-test {manifest.selftest[:200]!r} is not among the files"
    for piece in manifest.pieces:
        for what, value, roles in (
            ("expert", piece.expert, ("tail", "expert_layer")),
            ("layer", piece.layer, ("attention", "expert_layer")),
        ):
            if (value is not None) != (piece.role in roles):
                return f"a piece of role {piece.role} {'has no' if value is None else 'names its'} {what}"
        unknown = [path for path in piece.files if path not in sizes]
        if unknown or not piece.files:
            return f"piece {piece.name} uses {unknown[0] if unknown else 'no file'}, which is not among the files"
        if not any(path == piece.graph or path.startswith(piece.graph + "/") for path in piece.files):
            return f"piece {piece.name} does not list its graph {piece.graph} among its files"
    for piece in manifest.pieces:
        for weight in piece.weights:
            if weight.file not in piece.files:
                return f"piece {piece.name}: weight {weight.name} is in {weight.file!r}, which the piece does not list"
            if weight.offset % WEIGHT_ALIGNMENT or weight.offset + weight.bytes > sizes[weight.file]:
                return f"piece {piece.name}: weight {weight.name} lies outside {weight.file}, or across its alignment"
        names = [spec.name for spec in piece.inputs] + [weight.name for weight in piece.weights]
        if len(set(names)) != len(names):
            return f"piece {piece.name} names an input twice"
    classes = len(manifest.class_names)
    experts = manifest.routing.experts if manifest.routing else 0
    size = manifest.preprocessing.size
    shapes: dict[str, list[int | str]] = {IMAGES: [3, size, size], LOGITS: [classes], PROBABILITIES: [experts]}
    checked: tuple[str, list[TensorSpec], list[TensorSpec]] | None = None
    for piece in manifest.pieces:
        signature = (piece.role, piece.inputs, piece.outputs)
        if signature == checked:  # the next expert of many
            continue
        for spec in (*piece.inputs, *piece.outputs):
            if spec.shape[1:] != shapes.get(spec.name, spec.shape[1:]):
                return f"piece {piece.name}: {spec.name} is {spec.shape[1:]}, the rest says {shapes[spec.name]}"
        problem = _signature_problem(piece, manifest)
        if problem:
            return f"piece {piece.name}: {problem}"
        checked = signature
    if len(manifest.class_ids) != classes:
        return f"{len(manifest.class_ids)} class_ids but {classes} class_names"
    routing = manifest.routing
    names = [piece.name for piece in manifest.pieces]
    if routing is None:
        expected = ["model"]
    else:
        if routing.k > routing.experts:
            return f"routing: k is {routing.k}, but there are only {routing.experts} experts"
        if len(manifest.experts) != routing.experts:
            return f"describes {len(manifest.experts)} experts, routing has {routing.experts}"
        if any(index >= classes for expert in manifest.experts for index in expert.classes):
            return "an expert names a class that does not exist"
        # counted first, because a list of all pieces of an absurd routing would not fit in memory
        fewest = routing.experts * (1 if routing.k == 1 else routing.moe_layers)
        if fewest > len(names):
            return f"pieces do not fit the routing: there are {len(names)}, it needs more than {fewest}"
        expected = expected_pieces(routing)
    present = set(names)
    missing = [name for name in expected if name not in present]
    if missing or len(names) != len(expected):
        return f"pieces do not fit the routing: {'lacks ' + missing[0] if missing else 'there are too many'}"
    return None


def _signature_problem(piece: Piece, manifest: Manifest) -> str | None:
    """What a piece's role does not allow in its inputs and outputs, which the runtime uses by position."""
    fused = manifest.routing is not None and manifest.routing.router == "fused"
    inputs = {"tail": (2,), "expert_layer": (2,)}.get(piece.role, (1,))
    outputs = {"trunk": (1 + fused,), "router": (1,), "attention": (2,), "expert_layer": (1,)}.get(piece.role, (1, 3))
    for what, specs, counts in (("inputs", piece.inputs, inputs), ("outputs", piece.outputs, outputs)):
        if len(specs) not in counts or not all(spec.shape for spec in specs):
            return (
                f"has {len(specs)} {what}, or one without a shape; a {piece.role} has {' or '.join(map(str, counts))}"
            )
    classes, experts = len(manifest.class_names), manifest.routing.experts if manifest.routing else 0
    if piece.role == "router" or (piece.role == "trunk" and fused):
        if piece.outputs[-1].shape[1:] != [experts]:
            return f"its probabilities are {piece.outputs[-1].shape[1:]}, there are {experts} experts"
    elif piece.role in ("model", "tail", "head"):
        logits, *ranked = (spec.shape[1:] for spec in piece.outputs)
        if logits != [classes]:
            return f"its logits are {logits}, there are {classes} classes"
        if ranked and (ranked[0] != ranked[1] or ranked[0] not in [[n] for n in range(1, min(classes, 64) + 1)]):
            return f"it ranks {ranked[0]} and {ranked[1]} of {classes} classes"
    types = ["float32", "float32", "int64"] if len(piece.outputs) == 3 else ["float32"] * len(piece.outputs)
    if [spec.dtype for spec in piece.outputs] != types or any(spec.dtype != "float32" for spec in piece.inputs):
        return f"its types are not {', '.join(types)}, or an input is not float32"
    return None


def expected_pieces(routing: Routing) -> list[str]:
    """Names of all pieces of a routed model, in order."""
    names = ["trunk"] + (["router"] if routing.router == "separate" else [])
    if routing.k == 1:
        return names + [piece_name("tail", e) for e in range(routing.experts)]
    for layer in range(routing.moe_layers):
        names += [piece_name("attention", layer=layer)]
        names += [piece_name("expert_layer", e, layer) for e in range(routing.experts)]
    return [*names, "head"]
