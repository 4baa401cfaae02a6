"""Sources that torchvision downloads: image files where they are, other images as PNG."""

from __future__ import annotations

import io
import pickle
from hashlib import md5
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image

from tests.helpers.images import picture
from tests.helpers.sources import JPEGS, contents_of, open_quietly


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torchvision's data sets."""
    monkeypatch.setenv("TWINFEED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "torchvision"


@pytest.fixture
def cifar(home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """CIFAR-10 in its own layout, with 3 images per file, and with the checksums of these files."""
    rng = np.random.default_rng(0)
    folder = home / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = {}
    checksums: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels[name] = rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
        batch = {"data": pixels[name].reshape(3, -1), "labels": [0, 9, 4]}
        data = pickle.dumps(batch)
        (folder / name).write_bytes(data)
        split = "test_list" if name == "test_batch" else "train_list"
        checksums[split].append([name, md5(data).hexdigest()])
    data = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(data)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(data).hexdigest()}
    for attribute, value in {**checksums, "meta": meta}.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, attribute, value)
    return pixels


@pytest.mark.parametrize("split", ["", ":train", ":test"])
def test_cifar_keeps_its_pixels_labels_and_classes(
    cifar: dict[str, np.ndarray], scratch: Path, split: str
) -> None:
    source = open_quietly(f"torchvision:CIFAR10{split}", scratch)
    batches = [
        pixels for name, pixels in cifar.items() if (name == "test_batch") == (split == ":test")
    ]
    for i, pixels in enumerate(np.concatenate(batches)):
        image = np.asarray(Image.open(io.BytesIO(source.read(i))))
        np.testing.assert_array_equal(image.transpose(2, 0, 1), pixels)
    assert len(source) == (3 if split == ":test" else 15)
    assert (source.classes[9], source.labels[:3].tolist()) == ("class 9", [0, 9, 4])
    assert source.name(1) == f"torchvision:CIFAR10{split}, image 1"


def test_data_set_of_image_files_is_read_where_it_is(home: Path, scratch: Path) -> None:
    for i, wordnet_id in enumerate(["n01440764", "n02102040", "n01440764"]):
        file = home / "imagenette2" / "train" / wordnet_id / f"{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(JPEGS[i])
    source = open_quietly("torchvision:Imagenette", scratch)
    assert [(image, label) for _, image, label in contents_of(source)] == [
        (JPEGS[0], "tench, Tinca tinca"),
        (JPEGS[2], "tench, Tinca tinca"),
        (JPEGS[1], "English springer, English springer spaniel"),
    ]
    assert source.name(1) == "imagenette2/train/n01440764/2.JPEG"
    assert not list(scratch.iterdir())


def test_image_files_with_labels_in_a_table_are_read_where_they_are(
    home: Path, scratch: Path
) -> None:
    folder = home / "oxford-iiit-pet"
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    breeds = [("pug_1", 2), ("Bombay_2", 1), ("pug_3", 2)]
    for (name, _), jpeg in zip(breeds, JPEGS, strict=False):
        (folder / "images" / f"{name}.jpg").write_bytes(jpeg)
    table = "".join(f"{name} {number} 1 1\n" for name, number in breeds)
    (folder / "annotations" / "trainval.txt").write_text(table)
    contents = contents_of(open_quietly("torchvision:OxfordIIITPet:trainval", scratch))
    assert [(image, label) for _, image, label in contents] == [
        (JPEGS[0], "Pug"),
        (JPEGS[1], "Bombay"),
        (JPEGS[2], "Pug"),
    ]
    assert not list(scratch.iterdir())


def test_images_without_labels_have_none(
    home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unlabelled:
        def __init__(self, root: Path, split: str = "train", download: bool = False) -> None:
            assert (root, split, download) == (home, "unlabeled", True)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return picture(20, 10, seed=i, mode="CMYK"), -1

    monkeypatch.setattr(torchvision.datasets, "STL10", Unlabelled)
    source = open_quietly("torchvision:STL10:unlabeled", scratch)
    assert (source.classes, source.labels.tolist()) == ([], [-1, -1])
    assert Image.open(io.BytesIO(source.read(1))).mode == "RGB"


def test_without_a_network_the_message_names_the_folder_for_the_files(
    home: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("Name or service\nnot known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    message = r"torchvision:CIFAR100 .*not known.* into .*torchvision by hand"
    with pytest.raises(ValueError, match=message) as refused:
        open_quietly("torchvision:CIFAR100", scratch)
    assert str(home) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:CIFAR11", "has no downloadable data set 'CIFAR11'; try .*CIFAR10"),
        ("torchvision:ImageFolder", "has no downloadable data set 'ImageFolder'"),
        ("torchvision:", "has no downloadable data set ''"),
        ("torchvision:SVHN:tset", "Unknown value 'tset' for argument split"),
        ("torchvision:CIFAR10:tset", "has the splits train and test"),
    ],
)
@pytest.mark.usefixtures("home")
def test_unknown_data_sets_and_splits_are_refused(scratch: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{spec} ?.*{message}"):
        open_quietly(spec, scratch)
