"""A user's own images: brought into one form, split by class, learned and scored by the same
reading."""

import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from test_data import AS_THEY_ARE
from test_score import saved

from ebm import EBMError, data, schema
from ebm.data import folder, own, unit
from ebm.outliers import outlier_sets
from ebm.schema import FolderData
from pipelines import words
from pipelines.score import score

pytestmark = pytest.mark.usefixtures("one_stage")
SIDE = 8


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def put(path, image):
    """An array or an image as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    """`images/leaves` with 20 oaks, 10 birches and 5 stones, each its own noise."""
    monkeypatch.chdir(tmp_path)
    seeds = itertools.count()
    for name, count in {"oak": 20, "birch": 10, "stone": 5}.items():
        for k in range(count):
            put(Path(f"images/leaves/{name}/{k:02}.png"), pixels(next(seeds), SIDE, SIDE))
    return Path("images/leaves")


def settings(**changes):
    usual = {"path": "images/leaves", "size": SIDE, "colour": False, "outliers": ["stone"]}
    shares = {"validation": 0.1, "test": 0.2, "seed": 0, "reference": AS_THEY_ARE}
    return FolderData(kind="folder", **usual | shares | changes)


def prepared(**changes):
    return data.prepare(settings(**changes))


def test_each_image_is_in_one_split_with_its_class_and_its_pixels(root):
    found = prepared()
    assert found.manifest["classes"] == ["birch", "oak"]
    assert found.manifest["counts"] == {"train": 21, "validation": 3, "test": 6}
    paths = [path for path in folder.files(root) if path.parent.name != "stone"]
    index = torch.cat([found.tensors[f"{split}_index"] for split in data.SPLITS])
    assert sorted(index.tolist()) == list(range(30))
    for split, oaks in {"train": 14, "validation": 2, "test": 4}.items():
        rows, labels = found.tensors[f"{split}_index"], found.labels(split)
        assert labels.sum() == oaks
        for row, label, image in zip(rows, labels, found.tensors[split], strict=True):
            assert paths[row].parent.name == ["birch", "oak"][label]
            assert np.array_equal(image, np.asarray(Image.open(paths[row])))
    assert found.outliers()["stone"].shape == (5, SIDE, SIDE)


def test_pixels_of_12_bits_in_files_of_16_are_told_of(root, caplog):
    """Their upper 8 bits are 16 greys, of which a model learns little."""
    prepared()
    assert "no pixel is above" not in caplog.text
    for path in folder.files(root):
        levels = np.asarray(Image.open(path)).astype(np.uint16)
        put(path, Image.fromarray(levels * 16))
    prepared()
    assert "images/leaves: no pixel is above 15 of 255; 16-bit files give" in caplog.text


def test_images_that_no_memory_holds_are_told_of_before_they_are_read(root, monkeypatch):
    monkeypatch.setattr(own, "memory", lambda: 10_000)
    expected = r"images/leaves: 35 images of 8 x 8 pixels take 0\.0 GB, more than .* smaller size"
    with pytest.raises(EBMError, match=expected):
        prepared()


def test_without_folders_there_are_no_classes(root):
    found = prepared(path="images/leaves/oak", outliers=[], test=0.3)
    assert found.labels("train") is None
    assert "classes" not in found.manifest
    assert found.manifest["counts"] == {"train": 12, "validation": 2, "test": 6}


def test_the_same_images_give_the_same_files_and_a_changed_one_others(root, tmp_path):
    def written(name, **changes):
        data.write(prepared(**changes), tmp_path / name)
        return [(tmp_path / name / file).read_bytes() for file in (data.TENSORS, data.MANIFEST)]

    first = written("a")
    assert written("b") == first
    assert written("c", seed=1)[0] != first[0]
    put(root / "oak/00.png", pixels(7, SIDE, SIDE))
    assert written("d")[1] != first[1]


def test_images_are_cropped_about_the_middle_upright_on_white_in_8_bits(tmp_path):
    wide = np.zeros((SIDE, 3 * SIDE), np.uint8)
    wide[:, SIDE : 2 * SIDE] = pixels(0, SIDE, SIDE)
    middle = wide[:, SIDE : 2 * SIDE]
    assert np.array_equal(folder.read(put(tmp_path / "wide.png", wide), (SIDE, SIDE)), middle)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is on the left belongs on top
    turned = tmp_path / "turned.png"
    Image.fromarray(np.rot90(middle, 1).copy()).save(turned, exif=exif)
    assert np.array_equal(folder.read(turned, (SIDE, SIDE)), middle)
    clear = np.dstack([middle] * 3 + [np.zeros_like(middle)])
    assert folder.read(put(tmp_path / "clear.png", clear), (SIDE, SIDE)).unique().item() == 255
    deep = put(tmp_path / "deep.png", Image.fromarray(middle.astype(np.uint16) * 256 + 200))
    assert np.array_equal(folder.read(deep, (SIDE, SIDE)), middle)
    black = Image.fromarray(np.zeros((SIDE, SIDE), np.uint16))
    for name, transparency, grey in (("clear", 0, 255), ("opaque", 1, 0)):
        black.save(tmp_path / f"{name}16.png", transparency=transparency)
        read = folder.read(tmp_path / f"{name}16.png", (SIDE, SIDE))
        assert read.unique().item() == grey


def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch):
    def scandir(path="."):
        if Path(path).name == "birch":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(EBMError, match=r"birch: cannot be read: Permission denied"):
        folder.files(root)


def test_colours_stay_apart_or_become_grey(tmp_path):
    rgb = pixels(1, SIDE, SIDE, 3)
    path = put(tmp_path / "rgb.png", rgb)
    assert np.array_equal(folder.read(path, (3, SIDE, SIDE)), rgb.transpose(2, 0, 1))
    grey = folder.read(path, (SIDE, SIDE)).numpy().astype(float)
    assert np.abs(grey - rgb @ [0.299, 0.587, 0.114]).max() <= 1
    path = put(tmp_path / "grey.png", rgb[..., 0])
    assert np.array_equal(folder.read(path, (3, SIDE, SIDE)), np.stack([rgb[..., 0]] * 3))


def test_shrinking_averages(tmp_path):
    noise = put(tmp_path / "noise.png", pixels(2, 16 * SIDE, 16 * SIDE))
    assert unit(folder.read(noise, (SIDE, SIDE))).std() < 0.05


def test_what_is_no_image_by_its_name_is_left_out_and_said(root, caplog):
    (root / "oak/notes.txt").write_text("oaks")
    (root / "oak/.hidden.png").write_text("none")
    (root / ".cache").mkdir()
    (root / ".cache/00.png").write_text("none")
    assert len(folder.files(root)) == 35
    assert "1 files are left out" in caplog.text


def test_a_photograph_with_broken_notes_is_named(tmp_path):
    """Its height is text in its notes: Pillow finds out when it turns the image upright."""
    notes = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"\x01\x01\0\x02\0\0\0\x02x\0\0\0"
    notes += b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels(1, SIDE, SIDE, 3)).save(path, exif=notes)
    with pytest.raises(EBMError, match=r"photo\.jpg: cannot be read as an image"):
        folder.read(path, (SIDE, SIDE))


def damaged(root, name):
    path = root / "oak" / name
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("changes", "spoil", "line"),
    [
        ({"path": "images/absent"}, None, "images/absent: no such folder"),
        ({"path": "images/empty"}, None, "images/empty: no image; expected files whose names"),
        ({"outliers": ["rock"]}, None, "outliers: no folder 'rock' with images; it has birch, "),
        ({"path": "images/leaves/oak"}, None, "no folder 'stone' with images, and none at all"),
        ({"outliers": ["oak", "stone", "birch"]}, None, "outliers: no class is left to learn"),
        ({"validation": 0.01}, None, "images/leaves/birch: 10 images are too few for"),
        ({}, lambda root: damaged(root, "03.png"), "oak/03.png: cannot be read as an image ("),
        ({}, lambda root: put(root / "x.png", pixels(0, 4, 4)), "x.png: lies beside folders"),
        ({}, lambda root: (root / "oak/x.jpg").write_text("no"), "x.jpg: cannot be read as an"),
        ({}, lambda r: put(r / "oak/x.tif", np.ones((9, 9), np.float32)), "x.tif: cannot be"),
        ({}, lambda r: (r / "oak/x.png").symlink_to("none"), "x.png: no file, or a link to none"),
        ({}, lambda r: os.mkfifo(r / "oak/x.png"), "oak/x.png: no file, or a link to none"),
        ({}, lambda r: (r / "oak/up").symlink_to(".."), "oak/up: a link to a folder, in which"),
        ({}, lambda r: r.rename("x") and r.symlink_to("../x"), "leaves: a link to a folder, in"),
        ({}, lambda r: put(r / "oak/a\nb.png", pixels(0, 4, 4)), "b.png': a name that is no line"),
        (
            {},
            lambda r: put(r / "oak/\udce9.png", pixels(0, 4, 4)),
            "a name that is no line",
        ),
        ({"test": 0.1}, None, "images/leaves: 3 test images; expected at least 6"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_it(root, changes, spoil, line):
    Path("images/empty").mkdir()
    if spoil:
        spoil(root)
    with pytest.raises(EBMError) as caught:
        prepared(**changes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mark", ["\u202f", "\u00a0", "\u3000", "\u200d", "\u200e"])
def test_spaces_and_marks_of_other_scripts_are_part_of_a_name(root, mark):
    put(root / f"oak/a{mark}b.png", pixels(0, SIDE, SIDE))
    assert root / f"oak/a{mark}b.png" in folder.files(root)


NAMES = [["a", "a"], ["uniform"], ["mean"], ["test"], ["a/b"], ["../a"], ["a_std"], ["a&b"]]
NAMES += [["strict_2"]]


@pytest.mark.parametrize("outliers", NAMES)
def test_outliers_are_names_of_folders_that_no_other_set_has(outliers):
    with pytest.raises(ValidationError):
        settings(outliers=outliers)


def test_the_names_of_the_sets_that_are_drawn_are_reserved(root):
    drawn = set(outlier_sets(prepared(), 3, seed=0)) - {"stone"}
    assert drawn == set(schema.RESERVED_SETS) - {"train", "test", "samples", "mean"}


def test_names_of_what_is_measured_class_by_class_are_reserved():
    assert {f"{area.partition('_')[2]}_" for area in words.AREAS} == set(schema.PROTOCOLS)


def test_one_class_has_interpolations_too(root):
    """Of any two images: there are no two of different classes."""
    sets = outlier_sets(prepared(outliers=["birch", "stone"], test=0.3), 3, seed=0)
    assert {name: len(images) for name, images in sets.items()} == {
        "birch": 3,
        "stone": 3,
        "uniform": 3,
        "constant": 3,
        "interpolation": 3,
    }


@pytest.fixture
def model(root):
    """An untrained model of the images, in the form in which `train` leaves it."""
    return saved(Path("models/mine"), prepared(), dataset="leaves")


def scored(input, output="scores.csv", threshold=None):
    score(Path("models/mine"), Path(input), Path(output), threshold, chunk=100, threads=1)
    return pd.read_csv(output, dtype=str, keep_default_na=False)


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_images_are_scored_as_they_were_learned(root, model, batch, caplog, monkeypatch):
    monkeypatch.setattr("ebm.trained.BATCH", batch)
    with torch.no_grad():
        points = torch.cat([prepared().points(split) for split in data.SPLITS])
        expected = model.energy(points).double()
    middle = expected.sort().values[14:16].mean().item()
    with caplog.at_level(logging.INFO):
        found = scored(root, threshold=middle).set_index("file")
    assert list(found.index) == [p.relative_to(root).as_posix() for p in folder.files(root)]
    inliers = [p for p in found.index if not p.startswith("stone")]
    rows = torch.cat([prepared().tensors[f"{split}_index"] for split in data.SPLITS])
    of = found.loc[[inliers[row] for row in rows]]
    assert expected.std() > 0
    assert np.allclose(of["energy"].astype(float), expected, rtol=1e-5, atol=1e-6)
    assert found["anomaly"].tolist() == [str(int(float(e) >= middle)) for e in found["energy"]]
    assert "35 images in" in caplog.text


def test_a_model_of_bits_takes_black_and_white_alone(root, model):
    """On greys its energies are of nothing that it was trained or measured on."""
    config = Path("models/mine/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"binarize": "dynamic"}))
    with pytest.raises(EBMError, match=r"\.png: has greys at \d+x\d+ pixels; .*: dynamic`"):
        scored(root)
    assert not Path("scores.csv").exists()
    folder = Path("black-and-white")
    folder.mkdir()
    for name, level in (("black", 0), ("white", 255)):
        Image.new("L", (40, 30), level).save(folder / f"{name}.png")
    with torch.no_grad():
        shape = prepared().shape
        expected = model.energy(torch.stack([torch.zeros(shape), torch.ones(shape)]))
    assert np.allclose(scored(folder)["energy"].astype(float), expected, rtol=1e-5)


def test_a_damaged_image_is_named_and_leaves_no_output(root, model):
    damaged(root, "03.png")
    with pytest.raises(EBMError, match=r"oak/03\.png: cannot be read as an image"):
        scored(root)
    assert not Path("scores.csv").exists()


def test_an_image_is_never_overwritten(root, model):
    with pytest.raises(EBMError, match=r"--output .*03\.png: lies in the folder that is scored"):
        scored(root, root / "oak/03.png")


def test_stacks_of_two_are_no_images(root, model):
    config = Path("models/mine/config.json")
    config.write_text(config.read_text().replace('"shape": [', '"shape": [2, '))
    with pytest.raises(EBMError, match="images with 2 channels; expected one of grey or colour"):
        scored(root)


def test_a_table_is_not_for_a_model_of_images(root, model):
    Path("x.csv").write_text("a\n1\n")
    with pytest.raises(EBMError, match="models/mine: a model of images; expected a folder, not x"):
        scored("x.csv")


def test_test_images_that_were_trained_on_are_told(root, caplog):
    for path in (root / "oak").iterdir():
        shutil.copy(next((root / "birch").iterdir()), path)
    found = prepared()
    assert found.manifest["repeated"] >= 4
    assert "test images are in the training split as well" in caplog.text
