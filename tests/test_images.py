"""Published images: read from their original files, checked, brought into one form."""

import bz2
import gzip
import hashlib
import io
import math
import os
import tarfile
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import h5py
import pooch
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from test_data import AS_THEY_ARE, corrupt, density, digits

from ebm import EBMError, data
from ebm.data import Prepared, files, published, unit
from ebm.data.images import reshaped
from ebm.outliers import interpolation, levels, outlier_sets
from ebm.schema import ImageData


def some(*shape, top=256):
    """Arbitrary bytes, always the same."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(top, shape, generator=generator, dtype=torch.uint8)


def idx(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.dim()]) + sizes + array.numpy().tobytes())


def png(white):
    file = io.BytesIO()
    Image.fromarray(white.numpy()).save(file, "PNG")
    return file.getvalue()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def h5(values, labels):
    file = io.BytesIO()
    with h5py.File(file, "w") as content:
        content["test/data"], content["test/target"] = values.numpy(), labels.numpy()
    return file.getvalue()


def mat(images, labels):
    """As SVHN's: images last, ten for zero."""
    file = io.BytesIO()
    digits = labels.where(labels > 0, 10)
    savemat(file, {"X": images.permute(2, 3, 1, 0).numpy(), "y": digits[:, None].numpy()})
    return file.getvalue()


TRAIN, TEST = some(30, 28, 28), some(20, 28, 28).flip(0)
DRAWING = torch.full((105, 105), True)
DRAWING[:, 52:] = False  # ink on the right half
NUMBERS = some(12, 3, 32, 32)
BATCH = torch.cat([some(5, 1, top=10), some(5, 3072)], 1)
CONTENT = {
    f"{name}/{file}-ubyte.gz": idx(array)
    for name in ("mnist", "fashion-mnist")
    for file, array in {
        "train-images-idx3": TRAIN,
        "train-labels-idx1": torch.arange(30).byte() % 3,
        "t10k-images-idx3": TEST,
        "t10k-labels-idx1": torch.arange(20).byte() % 3,
    }.items()
} | {
    "omniglot/images_background_small1.zip": zipped(
        {"1/Greek/": b"", "1/Greek/a/1.png": png(DRAWING), "1/Latin/a/1.png": png(~DRAWING)}
    ),
    "omniglot/images_background_small2.zip": zipped(
        {"2/Latin/a/1.png": png(~DRAWING), "2/Latin/b/1.png": png(DRAWING.T.contiguous())}
    ),
    "usps/usps.h5": h5(some(7, 256) / 255, some(7, top=10)),
    **{f"cifar10/data_batch_{k}.bin": BATCH.numpy().tobytes() for k in (1, 2)},
    "cifar10/test_batch_first1000.bin": BATCH.flip(0).numpy().tobytes(),
    "svhn/train_32x32.mat": mat(NUMBERS, torch.arange(12).byte() % 10),
    "svhn/test_32x32.mat": mat(NUMBERS.flip(0), torch.arange(12).byte() % 10),
}


def publish(folder, monkeypatch, name, payload):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(payload)
    digest = hashlib.sha256(payload).hexdigest()
    monkeypatch.setitem(files.CHECKSUMS, name, f"sha256:{digest}")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of tiny files in the published formats, and nothing else to be had."""
    folder = tmp_path / "mirror"
    for name, payload in CONTENT.items():
        publish(folder, monkeypatch, name, payload)
    monkeypatch.setenv(files.MIRROR, str(folder))
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    monkeypatch.setattr(files, "URLS", dict.fromkeys(files.URLS, "http://127.0.0.1:9"))
    return folder


@pytest.fixture
def serve():
    """What makes a folder available by HTTP, until the test is over."""
    servers = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        servers.append(server)
        Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def images(
    name="mnist",
    outliers=("fashion-mnist", "omniglot", "usps"),
    validation=10,
    seed=0,
    binarize="none",
):
    return data.prepare(
        ImageData(
            kind="images",
            name=name,
            binarize=binarize,
            outliers=list(outliers),
            validation=validation,
            seed=seed,
            reference=AS_THEY_ARE,
        )
    )


@pytest.mark.usefixtures("mirror")
def test_splits_are_rows_of_the_published_parts():
    tensors = images().tensors
    rows = torch.cat([tensors["train_index"], tensors["validation_index"]])
    assert sorted(rows.tolist()) == list(range(30))
    assert tensors["test_index"].tolist() == list(range(20))
    for split, source in zip(data.SPLITS, (TRAIN, TRAIN, TEST), strict=True):
        index = tensors[f"{split}_index"]
        assert torch.equal(tensors[split], source[index])
        assert torch.equal(tensors[f"{split}_labels"], index % 3)


@pytest.mark.usefixtures("mirror")
def test_the_same_settings_give_the_same_images_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.write(images(seed=seed), tmp_path / name)
    for file in (data.TENSORS, data.OUTLIERS):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert (a == c) == (file == data.OUTLIERS)


@pytest.mark.usefixtures("mirror")
def test_outliers_are_read_back_and_checked(tmp_path):
    data.write(images(), tmp_path)
    prepared, expected = data.read(tmp_path), images().outliers()
    assert prepared.manifest["outliers"] == {"fashion-mnist": 20, "omniglot": 3, "usps": 7}
    assert prepared.outliers().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[k]) for k, tensor in prepared.outliers().items())
    corrupt(tmp_path / data.OUTLIERS, "flip")
    with pytest.raises(EBMError, match=r"outliers\.safetensors: checksum differs"):
        data.read(tmp_path).outliers()


@pytest.mark.usefixtures("mirror")
def test_drawings_are_bright_ink_each_once():
    part = published.part("omniglot", "test")
    assert torch.equal(part.images == 255, torch.stack([~DRAWING, DRAWING, ~DRAWING.T]))
    assert part.labels.tolist() == [0, 1, 2]
    small = reshaped(part.images, torch.Size([28, 28]))
    assert small[0, :, :13].max() == 0
    assert small[0, :, 15:].min() == 255
    assert torch.equal(small[2], small[0].T)


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize("how", ["sample", "threshold"])
def test_binarised_images_are_the_greys_on_or_off(how):
    grey, binary = images(), images(binarize=how)
    assert torch.equal(binary.tensors["train_index"], grey.tensors["train_index"])
    assert "binarised: " + how in binary.manifest["source"]
    sets = {name: (grey.tensors[name], binary.tensors[name]) for name in data.SPLITS}
    sets |= {name: (x, binary.outliers()[name]) for name, x in grey.outliers().items()}
    for before, after in sets.values():
        assert after.dtype == torch.uint8
        assert after.unique().tolist() == [0, 255]
        p, on = unit(before), unit(after)
        if how == "threshold":
            assert torch.equal(on, (p >= 0.5).float())
        else:
            assert abs((on - p).sum()) < 5 * (p * (1 - p)).sum().sqrt()
            assert not torch.equal(on, (p >= 0.5).float())
    again = images(binarize=how)
    assert torch.equal(binary.tensors["test"], again.tensors["test"])


@pytest.mark.usefixtures("mirror")
def test_bytes_to_draw_anew_are_kept_beside_bits_drawn_once():
    grey, once, anew = (images(binarize=how) for how in ("none", "sample", "dynamic"))
    assert torch.equal(anew.tensors.pop("train_greys"), grey.tensors["train"])
    for before, after in ((once.tensors, anew.tensors), (once.outliers(), anew.outliers())):
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.usefixtures("mirror")
def test_grey_images_become_equal_channels():
    outliers = images("cifar10", ["mnist"], validation=4).outliers()["mnist"]
    assert outliers.shape == (20, 3, 32, 32)
    assert torch.equal(outliers[:, 0], reshaped(TEST, torch.Size([32, 32])))
    assert torch.equal(outliers[:, 0], outliers[:, 2])


@pytest.mark.usefixtures("mirror")
def test_house_numbers_are_upright_colours_and_ten_is_zero():
    prepared = images("svhn", ["cifar10"], validation=3)
    assert torch.equal(prepared.tensors["test"], NUMBERS.flip(0))
    assert prepared.tensors["test_labels"].tolist() == [*range(10), 0, 1]
    cifar10 = prepared.outliers()["cifar10"]
    assert torch.equal(cifar10.flatten(1), BATCH.flip(0)[:, 1:])  # the same form: as they are


def test_colours_become_grey_by_luma():
    rgb = torch.eye(3, dtype=torch.uint8).mul(255).reshape(3, 3, 1, 1).expand(3, 3, 32, 32)
    grey = reshaped(rgb, torch.Size([28, 28]))
    assert grey.flatten(1).unique(dim=1).flatten().tolist() == [76, 150, 29]
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert reshaped(white, torch.Size([28, 28])).unique().tolist() == [255]


def test_resizing_averages_and_commutes_with_inverting():
    flat = torch.full((1, 105, 105), 77, dtype=torch.uint8)
    assert reshaped(flat, torch.Size([28, 28])).unique().tolist() == [77]
    noise, size = some(4, 64, 64), torch.Size([16, 16])
    small = reshaped(noise, size).float()
    assert small.std() < 0.25 * noise.float().std()  # over 4x4 pixels and more, not picked
    total = small + reshaped(255 - noise, size)
    assert (total - 255).abs().mean() < 0.1  # to the nearest byte: neither darker nor brighter


def test_usps_is_the_same_from_either_file(mirror, monkeypatch):
    expected = published.part("usps", "test")
    assert torch.equal(expected.images.flatten(1), some(7, 256))
    values = (some(7, 256).double() / 255 * 2 - 1).tolist()
    lines = (
        f"{label + 1} " + " ".join(f"{k + 1}:{v:.6f}" for k, v in enumerate(row))
        for label, row in zip(some(7, top=10).tolist(), values, strict=True)
    )
    publish(mirror, monkeypatch, "usps/usps.t.bz2", bz2.compress("\n".join(lines).encode()))
    (mirror / "usps/usps.h5").unlink()
    part = published.part("usps", "test")
    assert torch.equal(part.images, expected.images)
    assert torch.equal(part.labels, expected.labels)


def test_cifar10_is_the_archive_or_named_as_reduced(mirror, monkeypatch, caplog):
    reduced = images("cifar10", [], 4)
    tensors = reduced.tensors
    order = torch.cat([tensors["train_index"], tensors["validation_index"]]).argsort()
    pixels = torch.cat([tensors["train"], tensors["validation"]])[order].flatten(1)
    assert torch.equal(pixels, torch.cat([BATCH, BATCH])[:, 1:])
    assert torch.equal(tensors["test_labels"], BATCH.flip(0)[:, 0].long())
    assert "reduced to data_batch_1.bin, data_batch_2.bin" in reduced.manifest["source"]
    assert "the test part is reduced to test_batch_first1000.bin" in caplog.messages[-1]
    batches = {f"data_batch_{k}.bin": (BATCH ^ k).numpy().tobytes() for k in range(1, 6)}
    archive = tarred(batches | {"test_batch.bin": BATCH.numpy().tobytes()})
    publish(mirror, monkeypatch, "cifar10/cifar-10-binary.tar.gz", archive)
    full = images("cifar10", [], 4)
    assert full.manifest["counts"] == {"train": 21, "validation": 4, "test": 5}
    assert "reduced" not in full.manifest["source"]
    index = full.tensors["train_index"]
    assert torch.equal(full.tensors["train"][index == 24].flatten(), BATCH[4, 1:] ^ 5)


@pytest.mark.parametrize("how", ["flip", "truncate"])
@pytest.mark.parametrize("name", ["mnist/t10k-labels-idx1-ubyte.gz", "usps/usps.h5"])
def test_a_file_that_is_not_the_published_one_is_one_line(mirror, name, how):
    corrupt(mirror / name, how)
    with pytest.raises(EBMError, match=f"{name}: not the published file") as caught:
        images()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist/train-images-idx3-ubyte.gz", "cifar10/data_batch_2.bin"])
def test_a_file_that_is_nowhere_is_one_line_with_the_ways_to_get_it(mirror, name):
    (mirror / name).unlink()
    with pytest.raises(EBMError, match="is missing") as caught:
        images(name.split("/")[0], [])
    wanted = "cifar10/cifar-10-binary.tar.gz" if "cifar10" in name else name
    line = str(caught.value)
    assert line.startswith(f"{wanted} is missing: http://127.0.0.1:9/")
    assert "go online, or put the file into" in line
    assert files.MIRROR in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("address", "reason"), [("http://bad host/", "InvalidURL"), ("http://127.0.0.1:9", "Connect")]
)
def test_a_mirror_that_does_not_answer_is_no_damaged_file(
    mirror, monkeypatch, caplog, address, reason
):
    monkeypatch.setenv(files.MIRROR, address)
    with pytest.raises(EBMError, match="is missing"):
        images()
    assert f"{files.MIRROR}: " in caplog.text
    assert reason in caplog.text


@pytest.mark.usefixtures("mirror")
def test_a_cache_that_cannot_be_written_is_not_taken_for_being_offline(tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(EBMError, match=r"cache/usps: cannot be written: ") as caught:
        files._retrieve("http://127.0.0.1:9/usps.t.bz2", "usps/usps.t.bz2")
    assert not isinstance(caught.value, files.Missing)


@pytest.mark.parametrize("place", ["typo", "file:///typo", "s3://bucket/typo"])
def test_a_mirror_that_is_none_is_told(mirror, monkeypatch, place):
    monkeypatch.setenv(files.MIRROR, place if "://" in place else str(mirror / place))
    with pytest.raises(EBMError, match=f"{files.MIRROR} = .*typo: neither a folder nor"):
        images()


def test_the_mirror_comes_before_the_public_address(mirror, monkeypatch, serve):
    name, public = "usps/usps.t.bz2", mirror.parent / "public"
    publish(public, monkeypatch, "usps.t.bz2", b"published")
    publish(mirror, monkeypatch, name, b"published")
    monkeypatch.setitem(files.URLS, "usps", serve(public))
    assert files.fetch(name) == mirror / name
    (mirror / name).unlink()
    assert files.fetch(name) == mirror.parent / "cache" / name
    (public / "usps.t.bz2").unlink()
    assert files.fetch(name).read_bytes() == b"published"  # downloaded once


def test_a_mirror_may_be_an_address(mirror, monkeypatch, serve):
    expected = images()
    monkeypatch.setenv(files.MIRROR, f"{serve(mirror)}/")
    assert torch.equal(images().tensors["train"], expected.tensors["train"])
    (mirror / "mnist/t10k-images-idx3-ubyte.gz").write_bytes(b"another")
    (mirror.parent / "cache/mnist/t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(EBMError, match=r"http://.*: not the published file"):
        images()
    (mirror / "mnist/t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(EBMError, match=r"is missing: http://127\.0\.0\.1:9/"):
        images()


@pytest.mark.usefixtures("mirror")
def test_nothing_left_to_train_on_is_an_error():
    with pytest.raises(EBMError, match="validation = 30; expected at most 24: 6 images"):
        images(validation=30)


def on_levels(images, count):
    """Whether all values are multiples of 1 / (count - 1): bytes, not bytes with noise."""
    steps = images * (count - 1)
    return torch.equal(steps.round() / (count - 1), images) and steps.min() >= 0


MAKERS = {
    "bytes": (images, 256, 6),
    "colour": (lambda: images("cifar10", ["mnist", "omniglot"], 4), 256, 5),
    "digits": (lambda: digits(binarize="none"), 17, 3),
    "binary": (lambda: digits(binarize="sample"), 2, 2),  # constants would be of two kinds
    "binary bytes": (lambda: images(binarize="sample"), 2, 5),
}


@pytest.mark.usefixtures("mirror")
@pytest.mark.parametrize("name", MAKERS)
def test_all_sets_have_the_form_of_the_test_split(name):
    make, count, sets = MAKERS[name]
    prepared = make()
    test, found = prepared.points("test"), outlier_sets(prepared, 500, seed=0)
    assert levels(prepared) == count
    assert len(found) == sets
    for points in (test, *found.values()):
        assert points.dtype == torch.float32
        assert points.shape[1:] == test.shape[1:]
        assert on_levels(points, count)
        assert 0 <= points.min() <= points.max() <= 1
    assert ("constant" in found) == (count > 2)
    assert found["uniform"].unique().equal(torch.arange(count) / (count - 1))
    assert not on_levels(test + torch.rand_like(test) / 512, count)  # the rule can fail


def test_formulas_draw_what_they_say():
    prepared = digits(binarize="none")
    found = outlier_sets(prepared, 400, seed=0)
    flat = found["constant"].flatten(1)
    assert torch.equal(flat.min(1).values, flat.max(1).values)
    assert len(flat[:, 0].unique()) == 17
    each = torch.bincount((found["uniform"] * 16).long().flatten(), minlength=17)
    expected = each.sum() / 17
    assert ((each - expected).square() / expected).sum() < 40  # chi squared, 16 degrees: p = 0.001


def test_interpolations_are_means_of_two_classes_without_bias():
    """A class that is one image each: every mean of two of them, halves rounded either way."""
    values, labels = torch.tensor([[0, 4], [1, 4], [7, 7]]), torch.tensor([0, 0, 2])
    means = interpolation(values, labels, 4000, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in means.tolist()} == {
        (low, high) for low in (3, 4) for high in (5, 6)
    }
    assert means.double().mean(0).sub(torch.tensor([3.75, 5.5])).abs().max() < 0.03
    assert len(interpolation(values, torch.zeros(3), 9, torch.Generator())) == 0


@pytest.mark.usefixtures("mirror")
def test_classes_that_are_hardly_ever_two_leave_no_empty_set_behind():
    prepared = images()
    test = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    labels = torch.arange(2000).eq(0).long()
    rare = Prepared(prepared.tensors | {"test": test, "test_labels": labels}, prepared.manifest)
    assert all(len(points) for points in outlier_sets(rare, 2, seed=0).values())


@pytest.mark.usefixtures("mirror")
def test_draws_depend_on_the_seed_and_not_on_the_other_sets():
    a, b = outlier_sets(images(), 5, seed=0), outlier_sets(images(outliers=[]), 5, seed=0)
    assert b.keys() == {"uniform", "constant", "interpolation"}
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert not torch.equal(a["uniform"], outlier_sets(images(), 5, seed=1)["uniform"])
    assert {len(points) for points in a.values()} == {5, 3}  # three drawings are there


def test_points_have_no_outlier_sets():
    assert outlier_sets(density(), 5, seed=0) == {}


@pytest.mark.skipif("EBM_DATA_MIRROR" not in os.environ, reason="needs EBM_DATA_MIRROR")
def test_the_real_mnist_is_what_everybody_knows():
    """60,000 + 10,000 images, mean grey 0.1307 and deviation 0.3081 of the train part."""
    tensors = images(outliers=["omniglot", "usps"], validation=5000).tensors
    train = torch.cat([tensors["train"], tensors["validation"]]).double() / 255
    assert len(train) == 60_000
    assert train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert train.std().item() == pytest.approx(0.3081, abs=1e-4)
    assert tensors["test_labels"][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_stored_outliers_are_from_the_whole_of_their_set_and_once_each():
    """Files are sorted by class."""
    stored = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 4, 4)
    test = torch.randint(256, (30, 4, 4), dtype=torch.uint8)
    splits = {"train": test, "test": test}
    prepared = data.Prepared(splits, {"settings": {}}, lambda: {"other": stored})
    found = (255 * outlier_sets(prepared, 50, seed=0)["other"][:, 0, 0]).round().long()
    counts = found.bincount(minlength=200)
    assert counts.max() == 1
    assert (counts.view(4, 50).sum(1) > 4).all()  # of 12.5


def test_splits_are_binarised_by_draws_of_their_own(monkeypatch):
    half = torch.full((20, 8, 8), 128, dtype=torch.uint8)
    tensors = dict.fromkeys(data.SPLITS, half) | {
        f"{s}_labels": torch.zeros(20) for s in data.SPLITS
    }
    monkeypatch.setattr("ebm.data.images.splits", lambda *_: ("it", dict(tensors)))
    settings = ImageData(
        kind="images",
        name="mnist",
        binarize="sample",
        outliers=[],
        validation=5,
        seed=0,
        reference=AS_THEY_ARE,
    )
    found = data.prepare(settings).tensors
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        agree = (found[one] == found[other]).double().mean().item()
        assert agree == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(found[one].numel()))
