"""Data sets on disk: one rule for folders and zips, nothing dropped silently, and tables from any editor."""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvmoe_deploy.errors import DataError, MvmoeError
from mvmoe_deploy.images import Preprocessing
from mvmoe_deploy.models.train import folders
from mvmoe_deploy.models.train.data import ImageSet
from mvmoe_deploy.models.train.folders import has_split, read_class_names, read_images, read_superclasses

SIZE = Preprocessing(size=8)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
Tree = dict[str, bytes]


def picture(number: int, kind: str = "PNG") -> bytes:
    """A picture all of whose pixels are ``number``."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, number, number)).save(
        buffer, kind, **({"quality": 100} if kind == "JPEG" else {})
    )
    return buffer.getvalue()


def write(tree: Tree, where: Path, zipped: bool, split: str = "train") -> Path:
    """Writes the files as a folder or a zip; a path that ends in a slash is an empty folder."""
    where.mkdir()
    if zipped:
        with zipfile.ZipFile(where / f"{split}.zip", "w") as archive:
            for name, content in tree.items():
                archive.writestr(name, content)
    for name, content in tree.items():
        path = where / split / name
        if zipped:
            break
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return where


def read(
    tree: Tree, tmp_path: Path, zipped: bool, skip_unreadable: bool = False
) -> tuple[dict[str, list[int]], list[str]]:
    """The values of each class's images, and what was left out, without the path of the data set."""
    data = write(tree, tmp_path / ("zip" if zipped else "folder"), zipped)
    found = read_images(data, "train", SIZE, skip_unreadable=skip_unreadable)
    by_class: dict[str, list[int]] = {class_id: [] for class_id in found.class_ids}
    for pixels, label in zip(found.pixels, found.labels.tolist(), strict=True):
        by_class[found.class_ids[label]].append(int(pixels[0, 0, 0]))
    return by_class, [without_place(text, data) for text in found.left_out]


def without_place(text: str, data: Path) -> str:
    inside = re.sub(rf"{re.escape(str(data))}/train(/|\.zip:(?! ))", "", text)
    return re.sub(rf"{re.escape(str(data))}/train(\.zip)?", ".", inside)


TWO = {"n1/a.png": picture(1), "n2/b.png": picture(2), "n2/c.png": picture(3)}
BY_CLASS = {"n1": [1], "n2": [2, 3]}

LAYOUTS: dict[str, tuple[Tree, dict[str, list[int]], list[str]]] = {
    "plain": (TWO, BY_CLASS, []),
    "in the order of classes, not of paths": ({"a/1.png": picture(1), "a-b/1.png": picture(2), "a/0.png": picture(3)}, {"a": [3, 1], "a-b": [2]}, []),
    "images inside": (
        {"n1/images/a.png": picture(1), "n1/n1_boxes.txt": b"a.png\t0\t0\t62\t62\n", "n2/images/b.png": picture(2)},
        {"n1": [1], "n2": [2]},
        ["1 file that is no image (first: n1/n1_boxes.txt)"],
    ),
    "annotated": (
        {"images/val_0.JPEG": picture(1), "images/val_1.JPEG": picture(2), "images/val_2.JPEG": picture(3),
         "val_annotations.txt": b"val_0.JPEG\tn2\t0\t32\t44\t62\nval_1.JPEG\tn1\t52\t55\t57\t59\nval_2.JPEG\tn2\t1\t2\t3\t4\n"},
        {"n1": [2], "n2": [1, 3]},
        [],
    ),
    "annotated, an image away": (
        {"images/val_0.JPEG": picture(1), "val_annotations.txt": b"val_0.JPEG\tn2\nval_1.JPEG\tn2\n"},
        {"n2": [1]},
        ["1 named in val_annotations.txt but missing (first: val_1.JPEG)"],
    ),
    "sorted into classes, the annotations left": (
        {**TWO, "val_annotations.txt": b"a.png\tn1\n"}, BY_CLASS, []
    ),
    "a folder named as the split": ({f"train/{name}": content for name, content in TWO.items()}, BY_CLASS, []),
    "hidden": (
        {**TWO, ".DS_Store": b"x", "n1/.hidden.png": picture(9), "__MACOSX/n1/._a.png": b"x", ".ipynb_checkpoints/a.png": picture(9),
         "n1/.cache/deep/er/x.png": picture(9)},
        BY_CLASS,
        ["5 hidden files (first: .DS_Store)"],
    ),
    "content counts": (
        {**TWO, "n1/photo": picture(4, "JPEG"), "n1/photo.txt": picture(5), "n1/Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(50), "n2/list.csv": b"BM,GIF,P6\n", "n2/nothing": b""},
        {"n1": [1, 4, 5], "n2": [2, 3]},
        ["3 files that are no images (first: n1/Thumbs.db)"],
    ),
    "capitals": ({"n1/A.JPG": picture(1, "JPEG"), "n1/B.Png": picture(2)}, {"n1": [1, 2]}, []),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_class_is(layout: str, zipped: bool, tmp_path: Path) -> None:
    tree, by_class, left_out = LAYOUTS[layout]
    assert read(tree, tmp_path, zipped) == (by_class, left_out)


REFUSED: dict[str, tuple[Tree, str]] = {
    "deeper": ({**TWO, "n1/left/x.png": picture(1)}, "n1/left/x.png: lies in no class; expected CLASS/NAME, CLASS/images/NAME, or images/NAME with val_annotations.txt beside images"),
    "deeper, without an image's name": ({**TWO, "n1/left/x": picture(1)}, "n1/left/x: lies in no class"),
    "deeper still": ({**TWO, "n1/images/images/x.png": picture(1)}, "n1/images/images/x.png: lies in no class"),
    "above": ({**TWO, "x.png": picture(1)}, "x.png: lies in no class"),
    "both splits in one": ({f"{split}/{name}": content for split in ("train", "val") for name, content in TWO.items()}, "train/n1/a.png: lies in no class"),
    "not annotated": ({"images/x.png": picture(1)}, "images/x.png: lies in no class"),
    "annotated in part": ({"images/x.png": picture(1), "images/y.png": picture(1), "val_annotations.txt": b"y.png\tn1\n"}, "images/x.png: val_annotations.txt does not name its class"),
    "annotated twice": ({"images/y.png": picture(1), "val_annotations.txt": b"y.png\tn1\ny.png\tn2\n"}, "val_annotations.txt: line 2: 'y.png' has another class further up"),
    "an empty class": ({**TWO, "n3/": b""}, ".: n3: class folder without images"),
    "a class of hidden files": ({**TWO, "n3/.DS_Store": b""}, ".: n3: class folder without images"),
    "a class of other files": ({**TWO, "n3/notes.txt": b"no image"}, ".: n3: class folder without images"),
    "nothing": ({"n1/": b""}, ".: no images found; expected CLASS/*.JPEG inside"),
    "no images": ({"n1/notes.txt": b"no image"}, ".: no images found, but 1 file that is no image (first: n1/notes.txt); expected"),
    "a text file named like an image": ({**TWO, "n1/notes.jpg": b"no image"}, "n1/notes.jpg: not an image that can be read"),
    "an empty file named like an image": ({**TWO, "n1/x.jpg": b""}, "n1/x.jpg: not an image that can be read"),
    "a damaged image without an image's name": ({**TWO, "n1/x": picture(1)[:45]}, "n1/x: "),
    "HEIC": ({**TWO, "n1/x.heic": HEIC}, "n1/x.heic: "),
    "HEIC named JPEG": ({**TWO, "n1/x.jpg": HEIC}, "n1/x.jpg: "),
    "HEIC without a name": ({**TWO, "n1/x": HEIC}, "n1/x: "),
    "JPEG XL": ({**TWO, "n1/x.jxl": b"\xff\x0a" + bytes(20)}, "n1/x.jxl: "),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_name(case: str, zipped: bool, tmp_path: Path) -> None:
    tree, message = REFUSED[case]
    with pytest.raises(DataError) as error:
        read(tree, tmp_path, zipped)
    assert message in without_place(str(error.value), tmp_path / ("zip" if zipped else "folder"))


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_what_cannot_be_read_is_counted_when_it_may_be_left_out(zipped: bool, tmp_path: Path) -> None:
    tree = {**TWO, "n1/b.heic": HEIC, "n1/c.jpg": b"no image", "n1/d.txt": b"no image"}
    by_class, left_out = read(tree, tmp_path, zipped, skip_unreadable=True)
    assert by_class == BY_CLASS
    assert left_out[0].startswith("2 unreadable images (first: n1/b.heic: ")
    assert left_out[1:] == ["1 file that is no image (first: n1/d.txt)"]


def test_a_random_tree_is_the_same_as_a_folder_and_as_a_zip(tmp_path: Path) -> None:
    """Whichever files lie where, a folder and a zip are read alike, or refused in the same words."""
    random = np.random.default_rng(0)
    parts = ["n1", "n2", "images", ".git", "train", "__MACOSX", "a b", "ü"]
    names = ["x.png", "y.JPEG", "z", "notes.txt", ".DS_Store", "val_annotations.txt", "x.heic"]
    contents = [picture(7), picture(8, "JPEG"), b"no image", b"", HEIC, b"x.png\tn1\ny.JPEG\tn2\n", picture(7)[:70]]
    outcomes = set()
    for trial in range(150):
        tree: Tree = {}
        for _ in range(random.integers(1, 7)):
            depth = random.choice([0, 1, 1, 1, 1, 2, 2, 3])
            path = "/".join([*random.choice(parts, depth), random.choice(names)])
            tree[path] = contents[random.choice(len(contents), p=[0.4, 0.2, 0.1, 0.05, 0.05, 0.15, 0.05])]
        results = []
        for zipped in (False, True):
            place = tmp_path / str(trial)
            place.mkdir(exist_ok=True)
            try:
                results.append(str(read(tree, place, zipped, skip_unreadable=bool(trial % 2))))
            except MvmoeError as error:
                results.append(without_place(str(error), place / ("zip" if zipped else "folder")))
        assert results[0] == results[1], tree
        outcomes.add(results[0][:1] == "(")
    assert outcomes == {True, False}  # some are read, some refused


# what only a zip or only a folder can hold


@pytest.mark.parametrize("again", ["n1/a.png", "n1\\a.png", "./n1//a.png"])
def test_a_zip_that_holds_a_file_twice(again: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        warnings.simplefilter("ignore")
        for name in ("n1/a.png", again):
            archive.writestr(name, picture(1))
    with pytest.raises(DataError, match=r"train\.zip:.*a\.png: is in the zip file twice"):
        read_images(tmp_path, "train", SIZE)


def test_a_zip_from_windows(tmp_path: Path) -> None:
    assert (
        read({name.replace("/", "\\"): content for name, content in TWO.items()}, tmp_path, zipped=True)[0] == BY_CLASS
    )


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_a_name_that_would_command_a_terminal_is_shown_in_one_line(zipped: bool, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"n1/a\?\[2Jb\?c\.jpg: not an image that can be read"):
        read({**TWO, "n1/a\033[2Jb\nc.jpg": b"no image"}, tmp_path, zipped)


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    data = write(TWO, tmp_path / "data", zipped=False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.png").write_bytes(picture(4))
    (data / "train" / "n3").symlink_to(tmp_path / "elsewhere")
    (data / "train" / "n1" / "images").symlink_to(data / "train")
    assert len(read_images(data, "train", SIZE).labels) == 4


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    data = write(TWO, tmp_path / "data", zipped=False)
    os.mkfifo(data / "train" / "n1" / "b.png")
    with pytest.raises(DataError, match=r"b\.png: is not a regular file"):
        read_images(data, "train", SIZE)


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_a_file_too_large_to_be_an_image_is_not_read(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match=r"b\.png: takes 0\.0 GB, more than the 0\.0 GB of an image"):
        read({**TWO, "n1/b.png": picture(1) + bytes(1000)}, tmp_path, zipped)


# a validation split of a data set that has none


def values(images: ImageSet) -> set[int]:
    return set(images.pixels[:, 0, 0, 0].tolist())


def flat(tmp_path: Path) -> Tree:
    return {f"n{label}/{number:02}.png": picture(100 * label + number) for label in range(2) for number in range(20)}


@pytest.mark.parametrize("where", ["folder", "zip", "class folders alone"])
def test_a_share_of_each_class_is_the_validation_split(where: str, tmp_path: Path) -> None:
    data = write(flat(tmp_path), tmp_path / "data", zipped=where == "zip")
    if where == "class folders alone":
        data = data / "train"
    val = read_images(data, "val", SIZE, val_share=0.1)
    train = read_images(data, "train", SIZE, val.class_ids, val_share=0.1)
    assert val.labels.tolist() == [0, 0, 1, 1]
    assert torch.bincount(train.labels).tolist() == [18, 18]
    assert values(val) | values(train) == {*range(20), *range(100, 120)}
    assert not values(val) & values(train)
    assert values(read_images(data, "val", SIZE, val_share=0.2)) > values(val)


def test_a_share_is_at_least_one_image_and_never_all(tmp_path: Path) -> None:
    data = write(TWO | {"n1/d.png": picture(9)}, tmp_path / "data", zipped=False)
    for share in (1e-9, 0.999):
        assert torch.bincount(read_images(data, "val", SIZE, val_share=share).labels).tolist() == [1, 1]
    (data / "train" / "n1" / "d.png").unlink()
    with pytest.raises(DataError, match="class 'n1' has one image, too few for train and val"):
        read_images(data, "val", SIZE, val_share=0.5)


def test_a_validation_split_of_its_own_goes_first(tmp_path: Path) -> None:
    data = write(TWO, tmp_path / "data", zipped=False)
    write(TWO, tmp_path / "other", zipped=True, split="val")
    (tmp_path / "other" / "val.zip").rename(data / "val.zip")
    assert has_split(data, "val")
    assert len(read_images(data, "train", SIZE, val_share=0.5).labels) == 3
    assert len(read_images(data, "val", SIZE, val_share=0.5).labels) == 3


# tables


@pytest.mark.parametrize(
    "content",
    [
        b"a\tegg\nb\tcar\n",
        b"\xef\xbb\xbfa\tegg\nb\tcar\n",
        b"a\tegg\r\nb\tcar\r\n",
        b"a\tegg\rb\tcar",
        b'"a"\t"egg"\n"b"\t"car"\n',
        b"a\tegg\t\t\nb\tcar\tmore\n\t\t\n",
        b" a \t egg \nb\tcar",
        b"a\tegg\na\tegg\nb\tcar\n",
    ],
    ids=["plain", "byte order mark", "CRLF", "CR", "quotes", "more columns", "spaces", "the same line twice"],
)
def test_tables_from_any_editor(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_bytes(content)
    assert read_class_names(tmp_path, ["a", "b"]) == ["egg", "car"]
    groups = read_superclasses(tmp_path / "classes.tsv", ["a", "b"])
    assert (groups.names, groups.of_class) == (["egg", "car"], [0, 1])


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ('"egg, oval"', "egg"),
        ('"say ""egg"""', 'say "egg"'),
        ('beer "pint"', 'beer "pint"'),
        ('"Big" bird "Bob"', '"Big" bird "Bob"'),
        ('"', '"'),
        (",egg", "egg"),
        ("egg,", "egg"),
        ("Spiegelei\u2028 ü", "Spiegelei\u2028 ü"),
    ],
)
def test_the_quotes_of_a_spreadsheet_and_the_first_synonym(cell: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_text(f"a\t{cell}\n", encoding="utf-8")
    assert read_class_names(tmp_path, ["a"]) == [name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tegg\nb\tcar\na\tham\n", "line 3: class 'a' has another name further up"),
        (b"a\t,\nb\tcar\n", "line 1: class 'a' has no name"),
        (b'\n\na\t""\nb\tcar\n', "line 3 needs 2 tab-separated columns"),
        (b"\ta\tegg\nb\tcar\n", "line 1 needs 2 tab-separated columns"),
        (b"a,egg\nb,car\n", "line 1 needs 2 tab-separated columns"),
        ("a\tegg\nb\tcar\n".encode("utf-16"), "seems to be UTF-16; save it as UTF-8"),
        ("a\tegg\nb\tcar\n".encode("utf-16-le"), "seems to be UTF-16; save it as UTF-8"),
        ("a\tägg\nb\tcar\n".encode("latin-1"), "save it as UTF-8"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_tables_that_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_bytes(content)
    with pytest.raises(DataError, match=rf"classes\.tsv: .*{message}|classes\.tsv: {message}"):
        read_class_names(tmp_path, ["a", "b"])


def test_a_class_that_python_could_not_decode(tmp_path: Path) -> None:
    """As in a locale without UTF-8; checkpoints are text, so that they hold what the bytes mean."""
    for name in ("gr\udcc3\udcbcn", "rot"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name / "0.png")
    assert read_images(tmp_path, "val", Preprocessing(size=8)).class_ids == ["grün", "rot"]
