"""``python -m mvmoe_deploy.models.zoo.scripts``: renders the glyphs, writes images to evaluate on, lists licences."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mvmoe_deploy.errors import MvmoeError
from mvmoe_deploy.models.zoo.scripts import cache, tables
from mvmoe_deploy.models.zoo.scripts.faces import copyright_text
from mvmoe_deploy.models.zoo.scripts.licences import licence_of

READ = "reads a picture of characters with a bundle, with at most one expert in memory"
DESCRIPTION = "Renders the data set's characters, trains on them, writes images to evaluate on, and reads pictures."


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit status, which is 2 if something is missing; a line then says what."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # most encodings lack most of these characters
    try:
        options.run(options)
        sys.stdout.flush()
    except MvmoeError as error:
        print(f"scripts: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads the output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mvmoe_deploy.models.zoo.scripts", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_fonts, _add_pictures, _add_superclasses, _add_train, _add_map, _add_survey):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str, *, cached: bool = False) -> argparse.ArgumentParser:
    """Adds a command that needs the fonts, and with ``cached`` the rendered glyphs."""
    sub: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run)
    sub.add_argument(
        "--fonts",
        type=Path,
        metavar="DIR",
        help="unpacked packages, DIR/PACKAGE/usr/… (default: the installed ones)",
    )
    if cached:
        sub.add_argument(
            "--cache", type=Path, default=cache.default_folder(), metavar="DIR", help="rendered glyphs (%(default)s)"
        )
    return sub


def _add_fonts(commands: Any) -> None:
    _command(commands, "packages", _packages, "lists the font packages that the data set is made of")
    _command(commands, "licences", _licences, "reads each package's licences from its copyright file, as a table")
    render = _command(commands, "render", _render, "renders every glyph once", cached=True)
    render.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")


def _add_pictures(commands: Any) -> None:
    images = _command(
        commands, "images", _images, "writes a data folder for mvmoe-train evaluate, compare and analyse", cached=True
    )
    images.add_argument(
        "--split", choices=tables.SPLITS, default="test", help="split whose faces are used (%(default)s)"
    )
    images.add_argument("--per-class", type=int, default=4, metavar="N", help="images of each class (%(default)s)")
    images.add_argument("--seed", type=int, default=993, metavar="N", help="seed of the samples (%(default)s)")
    images.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder that val/ and classes.tsv are written into"
    )
    sample = _command(
        commands,
        "sample",
        _sample,
        "writes the images that are in the zoo: some that images writes for test faces",
        cached=True,
    )
    sample.add_argument("--out", type=Path, required=True, metavar="FILE.zip", help="such as DIR/val.zip")
    sign = _command(commands, "sign", _sign, "draws a picture to read: a sign in several scripts, from test faces")
    sign.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    reader = commands.add_parser("read", help=READ, description=READ)
    reader.set_defaults(run=_read)
    reader.add_argument("bundle", type=Path, help="exported from the zoo's characters")
    reader.add_argument("picture", type=Path, help="characters of one brightness on a plain ground, spaced apart")
    reader.add_argument("--text", type=Path, metavar="FILE", help="what the picture says, to count what was read right")
    reader.add_argument("--json", action="store_true", help="print what was read as JSON")


def _add_superclasses(commands: Any) -> None:
    groups = _command(
        commands, "superclasses", _superclasses, "groups classes by which of them a dense model confuses", cached=True
    )
    groups.add_argument("checkpoint", type=Path, metavar="CKPT", help="dense model that was trained on these classes")
    groups.add_argument("--experts", type=int, default=10, metavar="E", help="number of super-classes (%(default)s)")
    groups.add_argument(
        "--samples",
        type=int,
        default=150_000,
        metavar="N",
        help="number of samples that the model classifies (%(default)s)",
    )
    groups.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.tsv",
        help="table to write; a picture of the groups is written beside it",
    )


def _add_train(commands: Any) -> None:
    train = _command(
        commands, "train", _train, "trains a model on endless samples, with the recipe of the zoo's models", cached=True
    )
    train.add_argument(
        "--model", default="mvmoe_12x32", metavar="NAME", help="name of a shape, such as vit_12x32 (%(default)s)"
    )
    train.add_argument(
        "--moe-layers", type=int, default=2, metavar="L", help="number of MoE layers of a routed model (%(default)s)"
    )
    train.add_argument(
        "--superclasses", type=Path, metavar="TSV", help="super-classes that its router learns (default: the zoo's)"
    )
    train.add_argument("--gates", action="store_true", help="multiply experts by their gates in training too")
    train.add_argument(
        "--epochs", type=int, default=22, metavar="N", help="number of epochs, of 102,400 samples each (%(default)s)"
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and samples (%(default)s)")
    train.add_argument(
        "--kept", type=Path, metavar="FILE", help="samples that keep made; --seed is then that of the weights alone"
    )
    train.add_argument("--kept-seed", type=int, default=0, metavar="N", help="seed of the kept samples (%(default)s)")
    train.add_argument("--dense", type=Path, metavar="CKPT", help="dense model that a routed one starts from")
    train.add_argument(
        "--snapshots", type=int, default=0, metavar="N", help="keep the checkpoint of every N epochs in OUT.epochs/"
    )
    train.add_argument("--workers", type=int, default=0, metavar="N", help="processes that make samples (%(default)s)")
    train.add_argument("--threads", type=int, default=1, metavar="N", help="threads of PyTorch (%(default)s)")
    train.add_argument("--resume", action="store_true", help="go on after the last whole epoch")
    train.add_argument("--force", action="store_true", help="start again even if --out exists")
    train.add_argument("--out", type=Path, required=True, metavar="CKPT", help="checkpoint to write")


def _add_map(commands: Any) -> None:
    keep = _command(commands, "keep", _keep, "makes training samples once, for runs that share them", cached=True)
    keep.add_argument("--epochs", type=int, default=50, metavar="N", help="how many, in epochs (%(default)s)")
    keep.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (%(default)s)")
    keep.add_argument("--out", type=Path, required=True, metavar="FILE", help="a kilobyte for every sample")
    rows = _command(commands, "map", _map, "compares routed models with a dense one, as a table", cached=True)
    rows.add_argument("dense", type=Path, metavar="DENSE")
    rows.add_argument("routed", type=Path, nargs="+", metavar="ROUTED")
    rows.add_argument(
        "--images", type=int, default=40_000, metavar="N", help="images, fresh and unseen each (%(default)s)"
    )
    rows.add_argument("--without-gates", action="store_true", help="gates of one, as in training without gates")
    rows.add_argument("--snapshots", action="store_true", help="compare what --snapshots kept, epoch by epoch")
    rows.add_argument("--threads", type=int, default=1, metavar="N", help="threads of PyTorch (%(default)s)")


def _add_survey(commands: Any) -> None:
    survey = _command(
        commands, "survey", _survey, "makes the tables of fonts and classes anew from packages (for maintainers)"
    )
    survey.add_argument("packages", nargs="+", metavar="PACKAGE")
    survey.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder that fonts.tsv and classes.tsv are written into"
    )
    survey.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")


def _packages(_: argparse.Namespace) -> None:
    print(" ".join(sorted({row.face.package for row in tables.read_fonts()})))


def _licences(options: argparse.Namespace) -> None:
    fonts = tables.read_fonts()
    cache.locate(fonts, options.fonts)
    files: defaultdict[str, set[str]] = defaultdict(set)
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for row in fonts:
        files[row.face.package].add(row.face.file)
        splits[row.face.package].add(row.split)
    print("| package | faces of | fonts used | licence |\n| --- | --- | --- | --- |")
    for package in sorted(files):
        text = copyright_text(package, options.fonts)
        found = Counter(licence_of(text, file) for file in files[package])
        used = ", ".join(split for split in tables.SPLITS if split in splits[package])
        print(f"| {package} | {used} | {len(files[package])} | {', '.join(sorted(found))} |")


def _render(options: argparse.Namespace) -> None:
    glyphs = cache.build(
        options.cache,
        tables.read_fonts(),
        classes=tables.read_classes(),
        root=options.fonts,
        workers=options.workers,
        progress=_progress("faces"),
    )
    counts = ", ".join(
        f"{int(count):,} {split}" for split, count in zip(tables.SPLITS, glyphs.count.sum(1), strict=True)
    )
    print(f"{options.cache}: glyphs of {len(glyphs.classes):,} classes: {counts}; sha256 {glyphs.sha256}")


def _images(options: argparse.Namespace) -> None:
    from mvmoe_deploy.models.zoo.scripts import folder
    from mvmoe_deploy.models.zoo.scripts.dataset import Characters

    glyphs = cache.load(options.cache, tables.read_fonts(), tables.read_classes())
    samples = Characters(glyphs, options.split, options.seed)
    written = folder.write(samples, options.per_class, options.out / "val", _progress("batches"))
    folder.write_class_names(samples, options.out / "classes.tsv")
    print(f"{options.out}: {written:,} images of {len(samples.present):,} classes, {options.split} faces")


def _sample(options: argparse.Namespace) -> None:
    from mvmoe_deploy.models.zoo.scripts import folder
    from mvmoe_deploy.models.zoo.scripts.dataset import Characters

    fonts = tables.read_fonts()
    samples = Characters(cache.load(options.cache, fonts, tables.read_classes()), "test", 993)
    written = folder.write_zip(samples, fonts, per_class=4, count=500, licence="OFL", path=options.out)
    print(f"{options.out}: {written:,} images, {options.out.stat().st_size / 1e3:.0f} kB")


def _sign(options: argparse.Namespace) -> None:
    from mvmoe_deploy.models.zoo.scripts import sign

    sign.draw(options.fonts).save(options.out, optimize=True)
    print(f"{options.out}: {', '.join(text for text, _, _ in sign.LINES)}")


def _read(options: argparse.Namespace) -> None:
    from mvmoe_deploy import load
    from mvmoe_deploy.models.zoo.scripts import reading

    with load(options.bundle, max_resident=1) as runtime:
        found = reading.read(runtime, options.picture)
        text = reading.report(found, runtime)
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False))
        return
    print(text)
    if options.text is not None:
        right = reading.right(found, options.text.read_text(encoding="utf-8"))
        print(f"{right} of {len(found)} characters are as in {options.text}.")


def _superclasses(options: argparse.Namespace) -> None:
    from mvmoe_deploy.models import load_checkpoint
    from mvmoe_deploy.models.zoo.scripts import groups, picture
    from mvmoe_deploy.models.zoo.scripts.dataset import Characters

    fonts = tables.read_fonts()
    glyphs = cache.load(options.cache, fonts, tables.read_classes())
    model, _ = load_checkpoint(options.checkpoint)
    matrix = groups.confusions(model, Characters(glyphs, "train", 77), options.samples)
    found = groups.group(matrix, options.experts)
    superclasses = groups.named(matrix, found, [chr(each.first) for each in glyphs.classes])
    names = [superclasses.names[index] for index in superclasses.of_class]
    lines = [f"{each.id}\t{name}\t{each.name}\n" for each, name in zip(glyphs.classes, names, strict=True)]
    options.out.write_text("".join(lines), encoding="utf-8")
    picture.draw(glyphs, fonts, picture.typical(matrix, found, 24)).save(options.out.with_suffix(".png"))
    print(f"{options.out}: {groups.inside(matrix, found):.1%} of the confusions stay within their group")
    for index, name in enumerate(superclasses.names):
        print(f"{index:3} {names.count(name):6,} classes: {name}")


def _train(options: argparse.Namespace) -> None:
    import torch

    from mvmoe_deploy.models.registry import config_from_name
    from mvmoe_deploy.models.train.folders import read_superclasses
    from mvmoe_deploy.models.zoo.scripts import train
    from mvmoe_deploy.models.zoo.scripts.dataset import Characters, Kept
    from mvmoe_deploy.models.zoo.scripts.distort import SIZE

    torch.set_num_threads(options.threads)
    glyphs = cache.load(options.cache, tables.read_fonts(), tables.read_classes())
    ids = [each.id for each in glyphs.classes]
    shape: dict[str, Any] = {"image_size": SIZE, "patch_size": 8, "classes": len(ids)}
    superclasses = None
    if options.model.startswith("mvmoe"):
        superclasses = read_superclasses(options.superclasses or tables.HERE / "superclasses.tsv", ids)
        shape |= {"experts": len(superclasses.names), "moe_layers": options.moe_layers, "router_input": "mean"}
    config = config_from_name(options.model, **shape)
    how = train.recipe(options.epochs, options.seed)
    samples = None
    if options.kept is not None:
        samples = Kept(Characters(glyphs, "train", options.kept_seed), options.kept)
    train.train(
        glyphs,
        config,
        how=how,
        out=options.out,
        superclasses=superclasses,
        gates=options.gates,
        resume=options.resume,
        force=options.force,
        workers=options.workers,
        samples=samples,
        dense=options.dense,
        snapshots=options.snapshots,
        progress=lambda items, length, title: _progress(title)(items, length),
        report=lambda line: print(_line(line), flush=True),
    )


def _keep(options: argparse.Namespace) -> None:
    from mvmoe_deploy.models.zoo.scripts.dataset import Characters, Kept
    from mvmoe_deploy.models.zoo.scripts.train import SAMPLES_PER_EPOCH

    glyphs = cache.load(options.cache, tables.read_fonts(), tables.read_classes())
    samples = Characters(glyphs, "train", options.seed)
    Kept.keep(samples, options.epochs * SAMPLES_PER_EPOCH, options.out, _progress("batches"))
    print(f"{options.out}: {options.epochs * SAMPLES_PER_EPOCH:,} samples, {samples.identity}")


def _map(options: argparse.Namespace) -> None:
    import torch

    from mvmoe_deploy.models.zoo.scripts import points

    torch.set_num_threads(options.threads)
    shown = points.images(cache.load(options.cache, tables.read_fonts(), tables.read_classes()), options.images)
    pairs = points.snapshots(options.dense, options.routed) if options.snapshots else [(options.dense, options.routed)]
    forced, gates = not options.snapshots, not options.without_gates
    print(points.HEADER)
    for dense, routed in pairs:
        for point in points.compared(dense, routed, shown, forced=forced, gates=gates):
            print(point.line(), flush=True)


def _line(line: dict[str, Any]) -> str:
    router = "" if line["router_accuracy"] is None else f", router {line['router_accuracy']:.1%}"
    return (
        f"epoch {line['epoch']}: loss {line['loss']:.3f}, validation faces {line['val_accuracy']:.1%}{router}, "
        f"{line['images_per_second']:,.0f} images/s"
    )


def _survey(options: argparse.Namespace) -> None:
    from mvmoe_deploy.models.zoo.scripts.survey import survey

    rows, classes, licences = survey(options.packages, options.fonts, options.workers, _progress("faces"))
    options.out.mkdir(parents=True, exist_ok=True)
    tables.write_fonts(rows, options.out / "fonts.tsv")
    tables.write_classes(classes, options.out / "classes.tsv")
    print(f"{options.out}: {len(rows)} faces, {len(classes):,} classes")
    used = {row.face.package for row in rows}
    for package, found in licences.items():
        if package not in used:
            print(f"not used: {package} ({', '.join(f'{name}: {count}' for name, count in found.items())})")


def _progress(unit: str) -> Any:
    from tqdm import tqdm

    def wrap(iterator: Iterator[Any], length: int) -> Iterator[Any]:
        return iter(tqdm(iterator, total=length, unit=unit, disable=None))

    return wrap


if __name__ == "__main__":
    sys.exit(main())
