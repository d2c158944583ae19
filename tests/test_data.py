"""Prepared data: disjoint, reproducible, checked when read."""

import json
import os

import pytest
import torch
from small_models import Killed

from ebm import EBMError, data, files
from ebm.samplers import draw
from ebm.schema import CoordinatesReference, DensityData, DigitsData

AS_THEY_ARE = CoordinatesReference(kind="coordinates")


def digits(**changes):
    settings = {"binarize": "sample", "validation": 180, "test": 360, "seed": 0}
    return data.prepare(DigitsData(kind="digits", reference=AS_THEY_ARE, **settings | changes))


def density(**changes):
    settings = {"density": "8gaussians", "train": 50, "validation": 10, "test": 20, "seed": 0}
    return data.prepare(DensityData(kind="density", reference=AS_THEY_ARE, **settings | changes))


def test_splits_are_disjoint_and_complete():
    index = [digits().tensors[f"{split}_index"] for split in data.SPLITS]
    assert sorted(torch.cat(index).tolist()) == list(range(1797))


@pytest.mark.parametrize("how", ["sample", "threshold", "none"])
def test_binarisation_is_what_it_says(how):
    from sklearn.datasets import load_digits

    grey = torch.from_numpy(load_digits().images / 16).float()
    tensors = digits(binarize=how).tensors
    images, source = tensors["train"], grey[tensors["train_index"]]
    if how == "none":
        assert torch.equal(images, source)
        return
    assert set(images.unique().tolist()) == {0.0, 1.0}
    if how == "threshold":
        assert torch.equal(images, (source >= 0.5).float())
    else:
        error = (source * (1 - source)).sum().sqrt()
        assert abs((images - source).sum()) < 5 * error
        assert (images[source == 0] == 0).all()
        assert (images[source == 1] == 1).all()


def test_bits_that_are_drawn_anew_are_those_of_the_greys_and_only_for_training():
    grey, once, anew = (digits(binarize=how).tensors for how in ("none", "sample", "dynamic"))
    assert torch.equal(anew.pop("train_greys"), grey["train"])
    assert anew.keys() == once.keys()
    assert all(torch.equal(anew[name], once[name]) for name in once)


def test_bits_drawn_anew_are_on_as_often_as_they_are_bright():
    rows = digits(binarize="none").tensors["train"]
    draws = torch.stack([draw(rows) for _ in range(100)])
    assert draws.unique().tolist() == [0, 1]
    assert not torch.equal(draws[0], draws[1])
    deviation = (draws.mean(0) - rows) / (rows * (1 - rows) / 100).sqrt().clamp(min=1e-9)
    certain = (rows == 0) | (rows == 1)
    assert (deviation[certain] == 0).all()
    assert deviation[~certain].abs().max() < 6
    assert abs(deviation[~certain].square().mean() - 1) < 0.05


@pytest.mark.parametrize("make", [digits, density])
def test_the_same_settings_give_the_same_files_and_another_seed_others(tmp_path, make):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.write(make(seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / n / "splits.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_what_is_written_is_read_back(tmp_path):
    data.write(density(), tmp_path)
    prepared = data.read(tmp_path)
    assert torch.equal(prepared.tensors["test"], density().tensors["test"])
    assert prepared.shape == (2,)
    assert len(prepared.density.modes) == 8
    assert prepared.manifest["counts"] == {"train": 50, "validation": 10, "test": 20}


def corrupt(path, how):
    raw = bytearray(path.read_bytes())
    if how == "flip":
        raw[-1] ^= 1
    path.write_bytes(raw[: len(raw) // 2] if how == "truncate" else raw)
    if how == "remove":
        path.unlink()


@pytest.mark.parametrize("name", [data.TENSORS, data.MANIFEST])
@pytest.mark.parametrize("how", ["truncate", "remove"])
def test_a_corrupt_folder_is_one_line_that_names_the_file(tmp_path, name, how):
    data.write(density(), tmp_path)
    corrupt(tmp_path / name, how)
    with pytest.raises(EBMError, match=name) as caught:
        data.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_one_flipped_bit_is_noticed(tmp_path):
    data.write(density(), tmp_path)
    corrupt(tmp_path / "splits.safetensors", "flip")
    with pytest.raises(EBMError, match="checksum"):
        data.read(tmp_path)


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    data.write(density(), tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(EBMError, match="manifest"):
        data.read(tmp_path)


def test_nothing_left_to_train_on_is_an_error():
    with pytest.raises(EBMError, match="expected at most 1791: 6 images to train on"):
        digits(test=1700)


def test_points_have_neither_labels_nor_outliers():
    assert density().labels("test") is None
    assert density().outliers() == {}


def test_what_samples_are_compared_by_is_no_part_of_the_data():
    assert "reference" not in density().manifest["settings"]


def test_bytes_become_points_by_their_share_of_255_and_floats_stay():
    stored = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.equal(data.unit(stored), torch.tensor([0.0, 51 / 255, 1.0]))
    points = torch.randn(5)
    assert data.unit(points) is points


def test_labels_and_points_are_those_of_the_split():
    prepared = digits()
    assert torch.equal(prepared.labels("validation"), prepared.tensors["validation_labels"])
    assert torch.equal(prepared.points("validation"), prepared.tensors["validation"])


def test_no_split_of_exact_draws_repeats_another():
    sizes = {"train": 60, "validation": 60, "test": 60}
    prepared = data.prepare(
        DensityData(kind="density", density="25gaussians", seed=0, reference=AS_THEY_ARE, **sizes)
    )
    a, b, c = (prepared.tensors[split] for split in data.SPLITS)
    for one, other in ((a, b), (a, c), (b, c)):
        assert torch.cdist(one, other).min() > 0
        assert (one - other).norm(dim=1).min() > 0


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "it"
    files.replace(path, b"old")

    def dies(_):
        raise Killed

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(Killed):
        files.replace(path, b"new and longer")
    assert path.read_bytes() == b"old"
    files.replace(path, b"new", sync=False)
    assert [p.name for p in tmp_path.iterdir()] == ["it"]
    assert path.read_bytes() == b"new"


def test_who_holds_a_lock_is_seen_until_the_file_is_closed(tmp_path):
    path = tmp_path / "lock"
    assert not files.held(path)
    with files.locked(path):
        assert files.held(path)
        with pytest.raises(EBMError, match="at work"), files.locked(path, "another is at work"):
            pass
    with path.open("rb") as one, path.open("rb") as other:
        assert files.lock(one.fileno(), shared=True)
        assert files.lock(other.fileno(), shared=True)
        assert not files.held(path)
        assert files.held(path, shared=True)
    assert not files.held(path, shared=True)
