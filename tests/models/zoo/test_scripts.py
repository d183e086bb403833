"""Characters of many scripts: tables, licences, rendering, cache, and samples that are functions of their number."""

import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image
from scipy.sparse import csr_matrix

from mvmoe_deploy.checkpoint import Superclasses
from mvmoe_deploy.errors import DataError
from mvmoe_deploy.models import build, load_checkpoint
from mvmoe_deploy.models.registry import config_from_name
from mvmoe_deploy.models.zoo.scripts import cache, characters, folder, groups, picture, points, tables, train
from mvmoe_deploy.models.zoo.scripts.__main__ import main
from mvmoe_deploy.models.zoo.scripts.counter import draws, normal, uniform
from mvmoe_deploy.models.zoo.scripts.dataset import Characters, Kept
from mvmoe_deploy.models.zoo.scripts.distort import NUMBERS, distort
from mvmoe_deploy.models.zoo.scripts.faces import Face, faces_in, font_files
from mvmoe_deploy.models.zoo.scripts.licences import OPEN, licence_of
from mvmoe_deploy.models.zoo.scripts.render import SIDE, WHITE, render
from mvmoe_deploy.models.zoo.scripts.survey import survey
from mvmoe_deploy.models.zoo.scripts.tables import CharacterClass, FontRow

KNOWN = [[6235967106033911276, 4964577235801436555], [132316291454871238, 3579482929141750529]]
LETTERS = [ord(c) for c in "ABCDEFGHIJKLMNOPQRSTU"]
COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2001 Somebody
License: {licence}

Files: debian/*
Copyright: 2002 Somebody else
License: GPL-2+
"""


def draw_font(path, family, codes=LETTERS, shift=0, style="Regular"):
    """A font whose character n is a column of bars that spell n's bits; ``shift`` makes another design."""
    names = [f"g{code}" for code in codes]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(codes, names, strict=True)))
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for code, name in zip(codes, names, strict=True):
        pen = TTGlyphPen(None)
        for bit in range(7):
            width = 700 + shift if (code >> bit) & 1 else 150 + shift
            low, high = 100 * bit, 100 * bit + 60
            pen.moveTo((0, low))
            pen.lineTo((0, high))
            pen.lineTo((width, high))
            pen.lineTo((width, low))
            pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": style})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Twelve packages of one font each, unpacked; the last is not openly licensed."""
    root = tmp_path_factory.mktemp("fonts")
    for n in range(12):
        package = f"fonts-test{n:02d}"
        draw_font(root / package / "usr/share/fonts" / f"Test{n:02d}.ttf", f"Test {n:02d}", shift=11 * n)
        text = root / package / "usr/share/doc" / package / "copyright"
        text.parent.mkdir(parents=True)
        text.write_text(COPYRIGHT.format(licence="OFL-1.1" if n < 11 else "Proprietary"))
    return root


@pytest.fixture(scope="module")
def surveyed(packages):
    return survey(sorted(p.name for p in packages.iterdir()), packages)


@pytest.fixture(scope="module")
def glyphs(packages, surveyed, tmp_path_factory):
    rows, classes, _ = surveyed
    return cache.build(tmp_path_factory.mktemp("cache") / "glyphs", rows, classes, packages)


class TestTables:
    def test_shipped_ones_agree_with_the_rules(self):
        fonts, classes = tables.read_fonts(), tables.read_classes()
        assert {row.licence for row in fonts} <= set(OPEN)
        assert {row.split for row in fonts} == set(tables.SPLITS)
        assert len({(row.face.package, row.face.file, row.face.index) for row in fonts}) == len(fonts)
        codes = [code for each in classes for code in each.codes]
        candidates = characters.candidates()
        assert len(set(codes)) == len(codes) and set(codes) <= set(candidates)
        assert all(each.first == each.codes[0] and each.script == candidates[each.first] for each in classes)
        assert len(classes) > 5000

    def test_families_are_held_out_whole(self):
        split = {}
        for row in tables.read_fonts():
            assert split.setdefault((row.face.package, row.face.family), row.split) == row.split

    def test_written_and_read_back(self, tmp_path):
        rows = [FontRow(Face("p", "a b.ttf", index=2, family="Fam", style="Bold Italic"), "val", "OFL")]
        classes = [CharacterClass(0x41, [0x41, 0x391], "latin"), CharacterClass(0x8A9E, [0x8A9E], "han")]
        tables.write_fonts(rows, tmp_path / "f.tsv")
        tables.write_classes(classes, tmp_path / "c.tsv")
        assert tables.read_fonts(tmp_path / "f.tsv") == rows and tables.read_classes(tmp_path / "c.tsv") == classes
        assert classes[0].name == "A latin capital letter a (latin)" and classes[1].name == "語 han 8a9e (han)"


class TestCandidates:
    def test_scripts_with_thousands_of_characters_are_cut_by_frequency(self):
        found = characters.candidates()
        assert sum(script == "han" for script in found.values()) == characters.COMMON["han"]
        assert sum(script == "hangul" for script in found.values()) == characters.COMMON["hangul"]
        assert found[ord("的")] == "han" and ord("龘") not in found

    def test_every_script_has_some(self):
        assert set(characters.candidates().values()) == set(characters.SCRIPTS)


class TestLicences:
    @pytest.mark.parametrize(
        ("text", "font", "licence"),
        [
            (COPYRIGHT.format(licence="OFL-1.1"), "A.ttf", "OFL"),
            (COPYRIGHT.format(licence="Apache-2.0"), "A.ttf", "Apache-2.0"),
            (COPYRIGHT.format(licence="GPL-2+"), "A.ttf", "GPL-2+"),
            (COPYRIGHT.format(licence="GPL-2+ with Font exception"), "A.ttf", "GPL with font exception"),
            (COPYRIGHT.format(licence="GPL-2") + "\nFiles: sfd/Garuda*.sfd\nLicense: OFL\n", "Garuda-Bold.ttf", "OFL"),
            (COPYRIGHT.format(licence="GPL-2") + "\nFiles: sfd/Garuda*.sfd\nLicense: OFL\n", "Other.ttf", "GPL-2"),
            (COPYRIGHT.format(licence="GPL-3") + "\nFiles: sources/*\nLicense: OFL-1.1\n", "A.otf", "OFL"),
            (COPYRIGHT.format(licence="GPL-3") + "\nFiles: build/*\nLicense: MIT\n", "A.otf", "GPL-3"),
            ("These fonts are under the SIL Open Font License.", "A.ttf", "OFL"),
            ("You may use them under the GNU General Public License.", "A.ttf", "GPL"),
            ("Fonts: SIL Open Font License. Others are in the public domain.", "A.ttf", "unclear"),
            ("All rights reserved.", "A.ttf", "unclear"),
            ("", "A.ttf", "unclear"),
        ],
    )
    def test_read_from_the_copyright_file(self, text, font, licence):
        assert licence_of(text, font) == licence

    def test_exception_in_the_text_of_a_plainly_named_licence(self):
        text = COPYRIGHT.format(licence="GPL-2") + (
            "\nLicense: GPL-2\n As a special exception, if you create a document which uses this font, and embed this"
            " font,\n this font does not by itself cause the document to be covered by the licence.\n"
        )
        assert licence_of(text, "A.ttf") == "GPL with font exception"


class TestFaces:
    def test_found_in_an_unpacked_package(self, packages):
        files = font_files("fonts-test03", packages)
        assert list(files) == ["Test03.ttf"]
        ((face, codes),) = faces_in("fonts-test03", files["Test03.ttf"])
        assert face == Face("fonts-test03", "Test03.ttf", index=0, family="Test 03", style="Regular") and codes == set(
            LETTERS
        )

    def test_damaged_font_has_none(self, tmp_path):
        path = tmp_path / "broken.ttf"
        path.write_bytes(b"not a font")
        assert list(faces_in("p", path)) == []


class TestRender:
    def test_trimmed_scaled_and_centred(self, packages):
        pictures, codes = render(font_files("fonts-test00", packages)["Test00.ttf"], 0, LETTERS)
        assert codes == LETTERS and pictures.shape == (len(LETTERS), SIDE, SIDE) and pictures.dtype == np.uint8
        assert set(np.unique(pictures)) <= set(range(0, WHITE + 1, 36))
        for drawn in pictures:
            rows, columns = drawn.any(1).nonzero()[0], drawn.any(0).nonzero()[0]
            assert abs(rows[0] + rows[-1] - (SIDE - 1)) <= 1 and abs(columns[0] + columns[-1] - (SIDE - 1)) <= 1

    def test_sign_for_no_such_character_is_left_out(self, tmp_path):
        path = tmp_path / "same.ttf"
        draw_font(path, "Same", [0x4E00 + 128 * n for n in range(12)] + [0x4E01])  # twelve alike: equal low bits
        assert render(path, 0, [0x4E00 + 128 * n for n in range(12)] + [0x4E01])[1] == [0x4E01]


class TestSurvey:
    def test_rules(self, surveyed):
        rows, classes, licences = surveyed
        packages = {row.face.package for row in rows}
        assert "fonts-test11" not in packages and licences["fonts-test11"] == {"Proprietary": 1}
        splits = [row.split for row in rows]
        assert splits.count("test") >= 1 and splits.count("val") >= 1 and splits.count("train") >= 6
        assert [each.first for each in classes] == LETTERS

    def test_look_alikes_are_one_class(self, packages, tmp_path):
        """Greek capital alpha drawn as Latin A is in most fonts."""
        for n in range(10):
            name = f"fonts-two{n}"
            path = tmp_path / name / "usr/share/fonts" / f"Two{n}.ttf"
            draw_font(path, f"Two {n}", [*LETTERS, 0x3C1], shift=13 * n)  # 0x3C1 ends in the bits of 0x41
            text = tmp_path / name / "usr/share/doc" / name / "copyright"
            text.parent.mkdir(parents=True)
            text.write_text(COPYRIGHT.format(licence="OFL-1.1"))
        _, classes, _ = survey(sorted(p.name for p in tmp_path.iterdir()), tmp_path)
        assert next(each for each in classes if each.first == 0x41).codes == [0x41, 0x3C1]

    def test_families_that_draw_alike_are_held_out_together(self, tmp_path):
        for n in range(10):
            name = f"fonts-pair{n}"
            draw_font(tmp_path / name / f"P{n}.ttf", f"Pair {n}", shift=13 * (n // 2))  # every two are one design
            text = tmp_path / name / "usr/share/doc" / name / "copyright"
            text.parent.mkdir(parents=True)
            text.write_text(COPYRIGHT.format(licence="OFL-1.1"))
        rows, _, _ = survey(sorted(p.name for p in tmp_path.iterdir()), tmp_path)
        split = {row.face.family: row.split for row in rows}
        assert all(split[f"Pair {n}"] == split[f"Pair {n + 1}"] for n in range(0, 10, 2))


class TestCache:
    def test_counts_and_places(self, glyphs, surveyed):
        rows, classes, _ = surveyed
        assert len(glyphs.pictures) == len(rows) * len(classes)
        for part, split in enumerate(tables.SPLITS):
            assert (glyphs.count[part] == sum(row.split == split for row in rows)).all()
        place = glyphs.start[2, 5]
        assert glyphs.label[place] == 5 and rows[glyphs.face[place]].split == "test"

    def test_opened_again(self, packages, surveyed, tmp_path):
        rows, classes, _ = surveyed
        built = cache.build(tmp_path / "c", rows, classes, packages)
        assert cache.load(tmp_path / "c", rows, classes).sha256 == built.sha256
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
        with pytest.raises(DataError, match="other tables"):
            cache.load(tmp_path / "c", rows[:-1], classes)

    def test_missing_cache_names_the_command(self, surveyed, tmp_path):
        with pytest.raises(DataError, match=r"no rendered glyphs; .* render"):
            cache.load(tmp_path / "none", *surveyed[:2])

    def test_missing_packages_are_named_in_one_line(self, surveyed, tmp_path):
        with pytest.raises(DataError) as error:
            cache.build(tmp_path / "c", *surveyed[:2], tmp_path)
        message = str(error.value)
        assert "font packages are missing: apt-get install fonts-test" in message and "\n" not in message
        assert not (tmp_path / "c").exists()


class TestCounter:
    def test_a_function_of_seed_sample_and_number(self):
        whole = draws(7, torch.arange(1000), 9)
        assert torch.equal(draws(7, torch.tensor([500, 3]), 4), whole[[500, 3], :4])
        assert not torch.equal(draws(8, torch.arange(1000), 9), whole)

    def test_known_numbers(self):
        """They decide what every sample is, for ever."""
        assert draws(0, torch.arange(2), 2).tolist() == KNOWN

    def test_distributions(self):
        drawn = draws(3, torch.arange(2000), 100)
        u, n = uniform(drawn), normal(drawn)
        assert u.min() >= 0 and u.max() < 1 and abs(float(u.mean()) - 0.5) < 0.01
        assert abs(float(n.mean())) < 0.01 and abs(float(n.std()) - 1) < 0.01
        flat = u - 0.5
        assert abs(float((flat[:, 1:] * flat[:, :-1]).mean())) < 1e-3  # neighbours tell nothing of each other


class TestDistort:
    def test_in_range_and_not_the_same_twice(self):
        glyph = torch.zeros(64, SIDE, SIDE, dtype=torch.uint8)
        glyph[:, 12:36, 20:28] = WHITE
        out = distort(glyph, draws(0, torch.arange(64), NUMBERS))
        assert out.shape == (64, 32, 32) and out.min() >= 0 and out.max() <= 1
        assert len({picture.numpy().tobytes() for picture in out}) == 64
        middle, corner = out[:, 14:18, 14:18].mean((1, 2)), out[:, :3, :3].mean((1, 2))
        assert (middle > corner).float().mean() > 0.95  # bright on dark

    def test_a_sample_does_not_depend_on_its_batch(self):
        glyphs = torch.randint(0, WHITE + 1, (5, SIDE, SIDE), dtype=torch.uint8)
        drawn = draws(1, torch.arange(5), NUMBERS)
        together = distort(glyphs, drawn)
        apart = torch.cat([distort(glyphs[i : i + 1], drawn[i : i + 1]) for i in range(5)])
        assert torch.allclose(together, apart, atol=1e-5)


class TestSamples:
    def test_always_the_same(self, glyphs):
        samples = Characters(glyphs, "train", 5)
        images, labels = samples.batch(torch.arange(40, 60))
        again, label = Characters(glyphs, "train", 5)[47]
        assert images.dtype == torch.uint8 and images.shape == (20, 3, 32, 32)
        assert torch.equal(again, images[7]) and label == labels[7]
        pairs = samples.__getitems__([59, 40])
        assert torch.equal(pairs[0][0], images[19]) and pairs[1][1] == labels[0]
        assert torch.equal(samples.labels(torch.arange(40, 60)), labels)

    def test_seeds_and_splits_differ(self, glyphs):
        batches = [Characters(glyphs, s, n).batch(torch.arange(8))[0] for s in tables.SPLITS for n in (0, 1)]
        assert len({batch.numpy().tobytes() for batch in batches}) == 6

    def test_through_a_data_loader(self, glyphs):
        samples = Characters(glyphs, "train", 0, size=32)
        loader = torch.utils.data.DataLoader(samples, batch_size=8)
        assert len(loader) == 4
        images = torch.cat([images for images, _ in loader])
        assert torch.equal(images, samples.batch(torch.arange(32))[0])
        with pytest.raises(IndexError):
            samples[32]

    def test_balanced(self, glyphs):
        samples = Characters(glyphs, "test", 0)
        numbers = samples.balanced(3)
        assert torch.equal(samples.labels(numbers), torch.arange(len(LETTERS)).repeat_interleave(3))
        assert len(set(numbers.tolist())) == len(numbers)

    def test_identity_tells_them_apart(self, glyphs):
        assert len({Characters(glyphs, s, n).identity for s in tables.SPLITS for n in (0, 1)}) == 6

    def test_unknown_split(self, glyphs):
        with pytest.raises(DataError, match="no split 'dev'"):
            Characters(glyphs, "dev")


class TestKept:
    def test_the_same_samples_from_a_file_and_beyond_its_end(self, glyphs, tmp_path):
        samples = Characters(glyphs, "train", 5)
        Kept.keep(samples, 40, tmp_path / "kept")
        kept = Kept(samples, tmp_path / "kept")
        assert (tmp_path / "kept").stat().st_size == 40 * 32 * 32 and kept.identity == samples.identity
        for numbers in (torch.tensor([39, 0, 7]), torch.arange(38, 44)):
            assert all(torch.equal(a, b) for a, b in zip(kept.batch(numbers), samples.batch(numbers), strict=True))
        file = np.memmap(tmp_path / "kept", np.uint8, "r+")
        file[:1024] = 7  # it does read the file
        assert (Kept(samples, tmp_path / "kept").grey(torch.arange(1))[0] == 7).all()

    def test_others_are_refused(self, glyphs, tmp_path):
        Kept.keep(Characters(glyphs, "train", 5), 3, tmp_path / "kept")
        with pytest.raises(DataError, match=r"seed 5.*, not .*seed 6"):
            Kept(Characters(glyphs, "train", 6), tmp_path / "kept")
        with pytest.raises(DataError, match="none: no kept samples"):
            Kept(Characters(glyphs, "train", 5), tmp_path / "none")


class TestFolder:
    def test_a_data_folder_holds_the_samples(self, glyphs, tmp_path):
        samples = Characters(glyphs, "val", 1)
        assert folder.write(samples, 2, tmp_path / "val") == 2 * len(LETTERS)
        folder.write_class_names(samples, tmp_path / "classes.tsv")
        assert (tmp_path / "classes.tsv").read_text().splitlines()[0] == "U+0041\tA latin capital letter a (latin)"
        images, labels = folder.as_tensors(samples, 2)
        first = sorted((tmp_path / "val" / "U+0041").iterdir())[0]
        number = int(first.stem)
        assert np.array_equal(np.asarray(Image.open(first)).transpose(2, 0, 1), samples[number][0].numpy())
        assert len(images) == len(labels) == 2 * len(LETTERS)

    def test_a_zip_holds_some_of_them_of_one_licence(self, glyphs, surveyed, tmp_path):
        samples = Characters(glyphs, "train", 1)
        numbers = samples.balanced(2)
        chosen = sorted(set(samples.faces(numbers).tolist()))
        assert len(chosen) > 1 and all(surveyed[0][face].split == "train" for face in chosen)
        other = [replace(row, licence="IPA") if n == chosen[0] else row for n, row in enumerate(surveyed[0])]
        folder.write(samples, 2, tmp_path / "all")
        for name in ("a.zip", "b.zip"):
            assert folder.write_zip(samples, other, per_class=2, count=10, licence="OFL", path=tmp_path / name) == 10
        assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
        with zipfile.ZipFile(tmp_path / "a.zip") as archive:
            names = archive.namelist()
            assert len(set(names)) == 10 and len({name.split("/")[0] for name in names}) > 5
            for name in names:
                with Image.open(archive.open(name)) as one, Image.open(tmp_path / "all" / name) as same:
                    assert np.array_equal(np.asarray(one.convert("RGB")), np.asarray(same))
        shown = torch.tensor([int(name[-11:-4]) for name in names])
        assert chosen[0] not in samples.faces(shown).tolist()


class TestCommand:
    def test_packages(self, capsys):
        assert main(["packages"]) == 0
        assert "fonts-noto-core" in capsys.readouterr().out

    def test_missing_packages_end_it_in_a_line(self, tmp_path, capsys):
        assert main(["render", "--fonts", str(tmp_path), "--cache", str(tmp_path / "c")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("scripts: ") and "apt-get install" in error and error.count("\n") == 1

    def test_survey_render_images(self, packages, tmp_path, monkeypatch, capsys):
        names = sorted(p.name for p in packages.iterdir())
        arguments = ["survey", *names, "--fonts", str(packages), "--workers", "1", "--out", str(tmp_path / "tables")]
        assert main(arguments) == 0
        monkeypatch.setattr(tables.read_fonts, "__defaults__", (tmp_path / "tables" / "fonts.tsv",))
        monkeypatch.setattr(tables.read_classes, "__defaults__", (tmp_path / "tables" / "classes.tsv",))
        cached = ["--cache", str(tmp_path / "c")]
        assert main(["render", "--fonts", str(packages), "--workers", "1", *cached]) == 0
        assert main(["images", *cached, "--per-class", "1", "--out", str(tmp_path / "data")]) == 0
        assert main(["licences", "--fonts", str(packages)]) == 0
        out = capsys.readouterr().out
        assert f"{len(LETTERS)} images of {len(LETTERS)} classes" in out and "| fonts-test00 |" in out
        assert len(list((tmp_path / "data" / "val").iterdir())) == len(LETTERS)

    def test_runs_as_a_module(self):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mvmoe_deploy.models.zoo.scripts", "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0 and "render" in done.stdout


class TestGroups:
    def test_blocks_of_confusions_are_found(self):
        generator = np.random.default_rng(0)
        truth = generator.permutation(np.arange(60) % 4)
        matrix = np.where(truth[:, None] == truth[None], 1.0, 0.02) * generator.uniform(0.5, 1, (60, 60))
        found = groups.group(csr_matrix(matrix), 4)
        assert all(len(set(found[truth == g])) == 1 for g in range(4)) and len(set(found)) == 4
        assert groups.inside(csr_matrix(matrix), found) > 0.9
        named = groups.named(csr_matrix(matrix), found, [chr(0x4E00 + n) for n in range(60)])
        assert named.of_class == found.tolist() and all(len(name.split()) == 3 for name in named.names)

    def test_no_group_is_larger_than_its_bound(self):
        matrix = csr_matrix(np.random.default_rng(1).uniform(size=(50, 50)))
        assert np.bincount(groups.group(matrix, 5, slack=1.2)).max() <= 12

    def test_confusions_are_mean_answers(self, glyphs):
        config = config_from_name("vit_1x8", image_size=32, patch_size=16, heads=1, classes=len(LETTERS))
        matrix = groups.confusions(build(config).eval(), Characters(glyphs, "train", 7), 600)
        assert matrix.shape == (21, 21) and np.allclose(matrix.sum(1), 1, atol=1e-4)


class TestPicture:
    def test_a_row_for_each_group_of_openly_licensed_glyphs(self, glyphs, surveyed):
        rows = picture.typical(csr_matrix(np.ones((21, 21))), np.arange(21) % 2, 5)
        assert [list(row) for row in rows] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
        page = np.asarray(picture.draw(glyphs, surveyed[0], rows))
        assert page.shape == (2 * 54 + 6, 5 * 54 + 6) and page.min() == 255 - WHITE
        assert (np.asarray(picture.draw(glyphs, surveyed[0], rows, licence="IPA")) == 255).all()


class TestTrain:
    @pytest.fixture
    def short(self, monkeypatch):
        monkeypatch.setattr(train, "SAMPLES_PER_EPOCH", 512)
        return train.recipe(2)

    def config(self, name, **more):
        return config_from_name(name, image_size=32, patch_size=16, heads=1, classes=len(LETTERS), **more)

    def routed(self, glyphs, short, out, **options):
        config = self.config("mvmoe_2x16", experts=3, moe_layers=1, router_input="mean")
        superclasses = Superclasses(["a", "b", "c"], [n % 3 for n in range(len(LETTERS))])
        return train.train(glyphs, config, how=short, out=out, superclasses=superclasses, **options)

    def test_killed_and_resumed_it_sees_the_same_images(self, glyphs, short, tmp_path, monkeypatch):
        whole = self.routed(glyphs, short, tmp_path / "whole.pt")
        run = train.Trainer.train_epoch

        def killed(self, progress=None):
            if self.epoch == 1:
                raise KeyboardInterrupt
            return run(self, progress)

        monkeypatch.setattr(train.Trainer, "train_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            self.routed(glyphs, short, tmp_path / "killed.pt")
        monkeypatch.setattr(train.Trainer, "train_epoch", run)
        resumed = self.routed(glyphs, short, tmp_path / "killed.pt", resume=True)
        assert all(torch.equal(w, whole.weights[name]) for name, w in resumed.weights.items())

    def test_trained_without_gates_the_router_is_sharpened_once(self, glyphs, short, tmp_path, monkeypatch):
        sharp = self.routed(glyphs, short, tmp_path / "sharp.pt")
        again = self.routed(glyphs, short, tmp_path / "sharp.pt", resume=True)  # finished already
        assert sharp.header.training["router_sharpened"] == train.SHARPENED > 1
        monkeypatch.setattr(train, "SHARPENED", 1.0)
        plain = self.routed(glyphs, short, tmp_path / "plain.pt")
        for name, weights in plain.weights.items():
            factor = sharp.header.training["router_sharpened"] if name.startswith("router.") else 1
            assert torch.equal(sharp.weights[name], weights * factor)
            assert torch.equal(again.weights[name], sharp.weights[name])

    def test_without_gates_experts_answer_in_full(self):
        config = self.config("mvmoe_2x16", experts=3, moe_layers=1)
        gated, ungated = (build(config) for _ in range(2))
        ungated.load_state_dict(gated.state_dict())
        train.without_gates(ungated)
        x = torch.rand(4, 3, 32, 32)
        assert not torch.equal(gated(x), ungated(x))
        sure = {n: w * (1e6 if n.startswith("router.") else 1) for n, w in gated.state_dict().items()}
        gated.load_state_dict(sure)
        assert torch.allclose(gated(x), ungated(x), atol=1e-5)

    def test_gates_in_training(self, glyphs, short, tmp_path):
        checkpoint = self.routed(glyphs, short, tmp_path / "c.pt", gates=True)
        assert "router_sharpened" not in checkpoint.header.training

    def test_dense_learns_and_knows_its_data(self, glyphs, short, tmp_path):
        lines = []
        checkpoint = train.train(glyphs, self.config("vit_2x16"), short, tmp_path / "d.pt", report=lines.append)
        assert [line["epoch"] for line in lines] == [1, 2] and lines[1]["loss"] < lines[0]["loss"]
        assert checkpoint.header.class_names[0] == "A latin capital letter a (latin)"
        assert (
            checkpoint.header.superclasses is None and "characters of train faces" in checkpoint.header.training["data"]
        )

    def test_from_a_dense_model(self, glyphs, short, tmp_path):
        """Upcycled: every expert starts as the dense model's MLP."""
        dense = train.train(glyphs, self.config("vit_2x16"), short, tmp_path / "d.pt")
        short = replace(short, learning_rate=1e-30)
        upcycled = self.routed(glyphs, short, tmp_path / "m.pt", dense=tmp_path / "d.pt")
        stack = upcycled.weights["blocks.1.mlp.fc1.weight"]
        assert torch.allclose(stack, dense.weights["blocks.1.mlp.fc1.weight"].expand_as(stack))
        assert upcycled.header.training["started_from"]["file"] == "d.pt"

    def test_some_epochs_are_kept(self, glyphs, short, tmp_path):
        last = self.routed(glyphs, short, tmp_path / "m.pt", snapshots=1)
        kept = sorted(train.epochs_of(tmp_path / "m.pt").iterdir())
        assert [path.name for path in kept] == ["001.pt", "002.pt"]
        assert load_checkpoint(kept[0])[1].training["router_sharpened"] == train.SHARPENED
        again = load_checkpoint(kept[1])[0].state_dict()
        assert all(torch.equal(again[name], weights) for name, weights in last.weights.items())


class TestPoints:
    def test_a_line_for_each_model_and_kind_of_image(self, glyphs, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "SAMPLES_PER_EPOCH", 512)
        shape = {"image_size": 32, "patch_size": 16, "heads": 1, "classes": len(LETTERS)}
        superclasses = Superclasses(["a", "b", "c"], [n % 3 for n in range(len(LETTERS))])
        dense, routed = tmp_path / "dense.pt", tmp_path / "routed.pt"
        how = train.recipe(2)
        train.train(glyphs, config_from_name("vit_2x16", **shape), how, dense, snapshots=1)
        config = config_from_name("mvmoe_2x16", experts=3, moe_layers=1, router_input="mean", **shape)
        train.train(glyphs, config, how=how, out=routed, superclasses=superclasses, snapshots=1)
        shown = points.images(glyphs, 60)
        found = list(points.compared(dense, [routed], shown))
        assert [(p.dense, p.routed, p.shown, p.samples) for p in found] == [
            ("dense", "routed", "fresh", 1024),
            ("dense", "routed", "unseen", 1024),
        ]
        for p in found:
            assert p.points == pytest.approx(p.accuracy - p.dense_accuracy) and p.low <= p.points <= p.high
            assert len(p.line().split("\t")) == len(points.HEADER.split("\t"))
        pairs = list(points.snapshots(dense, [routed]))
        assert [(a.name, [b.name for b in others]) for a, others in pairs] == [
            ("001.pt", ["001.pt"]),
            ("002.pt", ["002.pt"]),
        ]
        (first, *_) = points.compared(*pairs[0], shown, forced=False)
        assert (first.dense, first.routed, first.samples, first.points_forced) == ("dense", "routed", 512, None)
        ungated = list(points.compared(dense, [routed], shown, gates=False))
        assert [(p.gates, p.router) for p in ungated] == [("one", p.router) for p in found]
        with pytest.raises(DataError, match="super-classes"):
            list(points.compared(dense, [dense], shown))
