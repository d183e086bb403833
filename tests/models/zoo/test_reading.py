"""The zoo's characters at work: the sign, how a picture is cut and read, and the labelled images that are in the zoo."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvmoe_deploy import load
from mvmoe_deploy.bench.measure.accuracy import numbered, read_labelled
from mvmoe_deploy.errors import BundleError, DataError, ImageError
from mvmoe_deploy.images import normalise
from mvmoe_deploy.models import ZOO, load_checkpoint
from mvmoe_deploy.models.zoo.scripts import cache, folder, reading, sign, tables
from mvmoe_deploy.models.zoo.scripts.__main__ import main
from mvmoe_deploy.models.zoo.scripts.dataset import Characters
from mvmoe_deploy.models.zoo.scripts.faces import font_files

DOCS = Path(__file__).parents[3] / "docs"
SCRIPTS = ZOO / "scripts"


def letter(character: str, line: int = 0, **more: object) -> reading.Read:
    facts: dict[str, object] = {"name": "x", "script": "latin", "probability": 0.5, "loaded": 0, "alike": character}
    facts |= {"expert": 1, "expert_name": "a b c", "gate": 0.9}
    return reading.Read(line=line, character=character, **{**facts, **more})  # type: ignore[arg-type]


class TestSign:
    def test_every_line_is_of_a_face_that_training_never_saw_under_an_open_licence(self) -> None:
        rows = {}
        for row in tables.read_fonts():
            rows.setdefault((row.face.package, row.face.file), []).append(row)
        for _, package, file in sign.LINES:
            found = rows[package, file]
            assert {row.split for row in found} == {"test"} and {row.licence for row in found} <= {
                "OFL",
                "Bitstream Vera",
            }

    def test_every_character_is_of_a_class(self) -> None:
        known = {code for each in tables.read_classes() for code in each.codes}
        assert {ord(each) for text, _, _ in sign.LINES for each in text} <= known

    def test_the_text_beside_the_picture_is_what_it_says(self) -> None:
        assert (DOCS / "cafe.txt").read_text(encoding="utf-8").split() == [text for text, _, _ in sign.LINES]

    def test_missing_packages_are_named_in_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["sign", "--fonts", str(tmp_path), "--out", str(tmp_path / "sign.png")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "apt-get install fonts-croscore fonts-dejavu-core fonts-inter" in error
        assert not (tmp_path / "sign.png").exists()

    def test_drawn_again_it_is_the_picture_of_the_docs(self) -> None:
        missing = sorted({package for _, package, file in sign.LINES if file not in font_files(package)})
        if missing:
            pytest.skip(f"font packages are not installed: {' '.join(missing)}")
        with Image.open(DOCS / "cafe.png") as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(sign.draw()))


class TestCut:
    """On blocks whose place and size are known."""

    @pytest.fixture
    def page(self) -> Image.Image:
        page = np.zeros((120, 200), np.uint8)
        page[10:50, 20:40] = 200
        page[10:50, 80:84] = page[10:50, 90:94] = 200  # one character of two strokes
        page[70:74, 30:60] = page[74:110, 30:34] = 200
        return Image.fromarray(page)

    def test_lines_and_characters(self, page: Image.Image) -> None:
        lines = reading.cut(page)
        assert [len(line) for line in lines] == [2, 1]
        for each in (each for line in lines for each in line):
            ink = each[..., 0] > 127
            rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
            side = each.shape[0]
            assert each.shape == (side, side, 3) and each.dtype == np.uint8
            assert abs(rows[0] + rows[-1] - (side - 1)) <= 1 and abs(columns[0] + columns[-1] - (side - 1)) <= 1
            assert max(np.ptp(rows), np.ptp(columns)) + 1 == pytest.approx(side * 38 / 48, abs=1)

    def test_dark_on_bright_and_colours_are_cut_alike(self, page: Image.Image) -> None:
        dark = Image.eval(page, lambda value: 255 - value)
        green = Image.composite(Image.new("RGB", page.size, "white"), Image.new("RGB", page.size, sign.GREEN), page)
        for other in (dark, green):
            cut = reading.cut(other)
            assert [len(line) for line in cut] == [2, 1]
            assert np.abs(cut[0][0].astype(int) - reading.cut(page)[0][0]).max() <= 1

    def test_an_accent_belongs_to_its_line(self, page: Image.Image) -> None:
        pixels = np.asarray(page).copy()
        pixels[7:9, 25:35] = 200  # one empty row above the first character
        assert [len(line) for line in reading.cut(Image.fromarray(pixels))] == [2, 1]

    def test_nothing_to_read(self) -> None:
        with pytest.raises(ImageError, match=r"grey\.png: shows no characters"):
            reading.cut(Image.new("RGB", (50, 50), "grey"), "grey.png")

    def test_the_sign_has_its_lines(self) -> None:
        with Image.open(DOCS / "cafe.png") as picture:
            assert [len(line) for line in reading.cut(picture)] == [len(text) for text, _, _ in sign.LINES]


class TestRead:
    def test_right_counts_look_alikes_and_reads_hebrew_from_the_right(self) -> None:
        found = [letter("K", alike="KΚ"), letter("B"), *(letter(each, 1) for each in "הפק")]
        assert reading.right(found, "ΚA\nקפה\n") == 4
        assert reading.right(found, "ΚB\nהפק\n") == 3
        with pytest.raises(DataError, match="the text has 4 characters, the picture 5"):
            reading.right(found, "K\nקפה\n")
        with pytest.raises(DataError, match="the text has 2 characters, the picture 5"):
            reading.right(found, "KB")

    def test_a_bundle_of_other_classes_is_refused(self, bundle_path: Path) -> None:
        with load(bundle_path, max_resident=1) as runtime, pytest.raises(BundleError, match="are not the zoo's"):
            reading.read(runtime, DOCS / "cafe.png")

    def test_a_bundle_that_is_missing_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["read", str(tmp_path / "none.mvmoe"), str(DOCS / "cafe.png")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


class TestSample:
    """The labelled images that are in the zoo."""

    @pytest.mark.parametrize(("name", "right"), [("dense", 364), ("moe", 378)])
    def test_the_zoos_models_have_the_accuracy_of_their_cards(self, name: str, right: int) -> None:
        model, header = load_checkpoint(SCRIPTS / f"{name}.safetensors")
        labelled = read_labelled(SCRIPTS / "sample", header.preprocessing, 1000)
        assert len(labelled.labels) == 500
        labels = numbered(labelled, header.class_ids, name)
        with torch.no_grad():
            logits = model(torch.from_numpy(normalise(labelled.pixels, header.preprocessing)))
        found = int((logits.argmax(1).numpy() == labels).sum())
        assert abs(found - right) <= 1  # rounding, which differs by processor, decides one image of thousands
        card = (SCRIPTS / f"{name}.md").read_text(encoding="utf-8")
        assert f"{right / 5:.1f} %" in card

    def test_they_are_of_different_classes(self) -> None:
        names = zipfile.ZipFile(SCRIPTS / "sample" / "val.zip").namelist()
        ids = [name.split("/")[0] for name in names]
        assert len(set(ids)) == len(ids) == 500 and set(ids) <= {each.id for each in tables.read_classes()}

    def test_they_are_rendered_again_where_the_glyphs_are(self, tmp_path: Path) -> None:
        fonts = tables.read_fonts()
        try:
            glyphs = cache.load(cache.default_folder(), fonts, tables.read_classes())
        except DataError as error:
            pytest.skip(str(error))
        folder.write_zip(
            Characters(glyphs, "test", 993), fonts, per_class=4, count=500, licence="OFL", path=tmp_path / "val.zip"
        )
        shipped, again = (zipfile.ZipFile(path) for path in (SCRIPTS / "sample" / "val.zip", tmp_path / "val.zip"))
        assert shipped.namelist() == again.namelist()
        for name in shipped.namelist():
            with Image.open(shipped.open(name)) as old, Image.open(again.open(name)) as new:
                assert np.abs(np.asarray(old).astype(int) - np.asarray(new)).max() <= 1, name
