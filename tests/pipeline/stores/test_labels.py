"""What evaluations ask of a store: labels by name, lists and fractions of them, and images that are at hand."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import (
    BadImage,
    LoaderOptions,
    MemoryStore,
    Store,
    Subset,
    center_view,
    encoded_bytes,
    open_loader,
    open_store,
    stratified_subset,
    subset_from_list,
    with_classes,
)
from pipeline.images import decode
from tests.helpers.images import encoded as encoded_as
from tests.helpers.images import picture
from tests.helpers.stores import as_records, decoder_of
from tests.pipeline.test_images import FORMATS, by_pillow, difference

# ── images at hand ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_and_a_pil_image_have_the_pixels_that_a_store_would_have(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    path.write_bytes(FORMATS[name])
    image = Image.open(path)
    about = dict(image.info)
    for at_hand in (path, str(path), image):
        assert np.array_equal(
            decode(encoded_bytes(at_hand), 30, 41).permute(1, 2, 0), by_pillow(FORMATS[name])
        )
    assert about.items() <= image.info.items(), "and the caller's has lost nothing"


def test_arrays_keep_their_pixels_whatever_their_strides() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    for array in (
        pixels,
        np.asfortranarray(pixels),
        np.repeat(pixels, 2, axis=1)[:, ::2],
        pixels[::-1][::-1],
    ):
        assert np.array_equal(Image.open(io.BytesIO(encoded_bytes(array))), pixels)
    assert np.array_equal(
        Image.open(io.BytesIO(encoded_bytes(pixels[:, :, 1]))),
        np.stack([pixels[:, :, 1]] * 3, axis=2),
    )


def test_16_bit_pil_images_are_scaled() -> None:
    levels = np.arange(0, 65536, 7, dtype=np.uint16)[: 96 * 97].reshape(96, 97)
    expected = np.repeat(np.rint(levels / 257.0)[:, :, None], 3, axis=2)
    assert np.array_equal(Image.open(io.BytesIO(encoded_bytes(Image.fromarray(levels)))), expected)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            np.zeros((4, 5, 3), dtype=np.float32),
            r"an array \[4, 5, 3\] of float32 is not an image: give uint8",
        ),
        (
            np.zeros((3, 4, 5), dtype=np.uint8),
            r"\[3, 4, 5\] of uint8 is no image.*\[height, width, 3\]",
        ),
        (np.zeros((4, 5, 4), dtype=np.uint8), r"\[4, 5, 4\]"),
        (np.zeros(5, dtype=np.uint8), r"\[5\]"),
        (None, "object"),
        (Image.new("F", (4, 5)), "mode F.*make it RGB"),
        ("nowhere/a.jpg", "nowhere/a.jpg: No such file.*Name the file"),
        (Path(__file__).parent, "tests: Is a directory"),
    ],
    ids=[
        "float32",
        "channels first",
        "four channels",
        "one axis",
        "none",
        "mode F",
        "no file",
        "a folder",
    ],
)
def test_what_is_no_image_is_refused_with_the_remedy(wrong: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encoded_bytes(wrong)


def test_a_damaged_file_behind_a_pil_image_is_a_bad_image_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(FORMATS["png"][: len(FORMATS["png"]) // 2])
    with (
        Image.open(tmp_path / "half.png") as image,
        pytest.raises(BadImage, match=r"half\.png: .*truncated"),
    ):
        encoded_bytes(image)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"text", "b: it is not a JPEG"),
        (b"", "b: "),
        (encoded_bytes(np.zeros((0, 4, 3), dtype=np.uint8)), "b: "),
    ],
)
def test_images_in_memory_need_a_size(data: bytes, said: str) -> None:
    with pytest.raises(BadImage, match=said):
        MemoryStore([FORMATS["jpeg"], data], ["a", "b"])


def test_images_in_memory_go_through_the_pipeline_as_those_of_a_folder(photos: Path) -> None:
    folder = open_store(photos)
    paths = [folder.name(i) for i in range(60)]
    images: list[Any] = [path if i % 3 else Image.open(path) for i, path in enumerate(paths)]
    store: Store = pickle.loads(
        pickle.dumps(MemoryStore([encoded_bytes(image) for image in images], paths))
    )
    assert [store.name(i) for i in range(60)] == paths
    assert store.classes == []
    ours, theirs = (
        open_loader(s, center_view(32), LoaderOptions(batch_size=16, shuffle=False)).epoch(0)
        for s in (store, folder)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.views[0], b.views[0])
        assert (a.labels == -1).all()
    assert MemoryStore([FORMATS["jpeg"]]).name(0) == "image 0"


def test_dali_reads_images_in_memory_too() -> None:
    pytest.importorskip("nvidia.dali")
    store = MemoryStore([encoded_as(picture(41, 30, seed=i)) for i in range(4)])
    boxes = np.tile(np.array([0, 0, 41, 30], np.float32), (1, 4, 1))
    ((crops, good),) = decoder_of("dali", store, center_view(24)).stream([(np.arange(4), boxes)])
    assert good.all()
    for i in range(4):
        expected = picture(41, 30, seed=i).resize((24, 24), Image.Resampling.BILINEAR)
        assert difference(crops[0, i], expected) <= 0.5


# ── classes by name ──────────────────────────────────────────────────────────────────────────────────────────────────


def put(root: Path, *names: str) -> Store:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(FORMATS["jpeg"])
    return open_store(root)


def test_labels_are_renumbered_by_name(tmp_path: Path) -> None:
    store = put(tmp_path, "wolf/1.jpg", "cat/2.jpg", "wolf/3.jpg", "ant/4.jpg")
    classes = ["ant", "bee", "wolf", "cat"]
    part = pickle.loads(pickle.dumps(with_classes(store, classes)))
    assert part.classes == classes
    for i in range(4):
        assert classes[part.index["label"][i]] == Path(part.name(i)).parent.name
    assert store.index["label"].tolist() == [0, 1, 2, 2], "the store itself stays as it is"
    assert part.read_batch(np.array([1])) == [FORMATS["jpeg"]]


def test_classes_that_training_lacks_are_named_with_an_image(tmp_path: Path) -> None:
    store = put(tmp_path, *(f"class{i}/{i}.jpg" for i in range(9)))
    with pytest.raises(
        ValueError, match=r"class2/2\.jpg: .* no class class2, class3, class5 and 3 more"
    ):
        with_classes(store, ["class0", "class1", "class4"])
    with_classes(
        Subset(store, np.array([0, 4])), ["class4", "class0"]
    )  # a class without images is no matter


# ── parts of the labels ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fraction_has_its_share_of_each_class_by_the_seed(tmp_path: Path) -> None:
    names = [
        f"{name}/{i}.jpg"
        for name, count in (("few", 3), ("many", 50), ("some", 20))
        for i in range(count)
    ]
    store = put(tmp_path, *names)
    for fraction, expected in (
        (0.1, [1, 5, 2]),
        (0.01, [1, 1, 1]),
        (0.55, [2, 28, 11]),
        (1, [3, 50, 20]),
    ):
        part = stratified_subset(store, fraction, seed=3)
        assert np.bincount(part.index["label"]).tolist() == expected
        assert (np.diff(part.samples) > 0).all()
        assert np.array_equal(part.samples, stratified_subset(store, fraction, seed=3).samples)
    tenth, half = (
        set(stratified_subset(store, fraction, seed=3).samples.tolist()) for fraction in (0.1, 0.5)
    )
    assert tenth < half
    chosen = Counter(
        i for seed in range(200) for i in stratified_subset(store, 0.1, seed).samples.tolist()
    )
    assert all(
        20 - 5 * 4.3 < chosen[i] < 20 + 5 * 4.3 for i in range(3, 73)
    )  # each one in ten, give or take 4.3


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fractions_are_above_0_and_at_most_1(photos: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"a fraction of {fraction:g} of the labels"):
        stratified_subset(open_store(photos), fraction)


def test_labels_are_needed_where_labels_are_taken(tmp_path: Path) -> None:
    none, some = (
        put(tmp_path / "none", "1.jpg", "2.jpg"),
        put(tmp_path / "some", "a/1.jpg", "b/2.jpg", "b/3.jpg"),
    )
    some.index["label"][1] = -1
    for store, said in ((none, r"1\.jpg has none, as 2 of 2 images"), (some, r"2\.jpg has none")):
        for use in (
            lambda store: stratified_subset(store, 0.1),
            lambda store: with_classes(store, ["a", "b"]),
        ):
            with pytest.raises(
                ValueError, match=f"labels are needed, but .*{said}: .*sub-folder for each class"
            ):
                use(store)


def test_a_list_names_images_by_file_or_by_path(tmp_path: Path) -> None:
    store = put(
        tmp_path / "data", *(f"n{i % 3}/n{i % 3}_{i}.JPEG" for i in range(12)), "n0/deep/x 1.JPEG"
    )
    paths = [Path(store.name(i)).relative_to(tmp_path / "data") for i in range(len(store))]
    list_ = tmp_path / "1percent.txt"
    list_.write_bytes(
        b"\xef\xbb\xbfn2_5.JPEG\r\nn0/n0_3.JPEG\r\n\r\n  n1_1.JPEG \nx 1.JPEG\nn2_5.JPEG\n"
    )
    part = subset_from_list(store, list_)
    expected = ["n0/deep/x 1.JPEG", "n0/n0_3.JPEG", "n1/n1_1.JPEG", "n2/n2_5.JPEG"]
    assert [str(paths[i]) for i in part.samples] == expected
    assert [store.classes[label] for label in part.index["label"]] == ["n0", "n0", "n1", "n2"]
    half = Subset(with_classes(store, ["n2", "n1", "n0"]), np.array([12, 1, 0]))
    list_.write_text(f"{paths[1].name}\n{paths[12].name}\n")
    assert [half.name(i) for i in subset_from_list(half, list_).samples] == [
        store.name(12),
        store.name(1),
    ]


def test_wrong_lists_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    store = put(tmp_path / "data", "a/1.jpg", "b/1.jpg", "b/2.jpg", "a.jpg")
    list_ = tmp_path / "list.txt"
    list_.write_text("2.jpg\n7.jpg\n8.jpg\nb/9.jpg\na/2.jpg\n")
    with pytest.raises(
        ValueError,
        match=r"list\.txt: 4 of its 5 names are not in .*: 7\.jpg, 8\.jpg, b/9\.jpg and 1",
    ):
        subset_from_list(store, list_)
    list_.write_text("2.jpg\n1.jpg\n")
    with pytest.raises(ValueError, match=r"1 of its 2 names belong to several images there, .*: 1\.jpg$"):
        subset_from_list(store, list_)
    list_.write_text("b/1.jpg\n")
    assert subset_from_list(store, list_).name(0).endswith("b/1.jpg")
    list_.write_text("\n \n")
    with pytest.raises(ValueError, match=r"list\.txt names no image"):
        subset_from_list(store, list_)
    with pytest.raises(ValueError, match=r"gone\.txt: No such file"):
        subset_from_list(store, tmp_path / "gone.txt")
    list_.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"list\.txt: "):
        subset_from_list(store, list_)


def test_a_list_of_records_is_refused_with_the_remedy(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "list.txt").write_text("0000.jpg\n")
    for store in (
        as_records(open_store(photos), tmp_path),
        MemoryStore([encoded_as(picture(9, 9))]),
    ):
        with pytest.raises(
            ValueError, match=r"list\.txt names files, .* name the folder, or give a fraction"
        ):
            subset_from_list(Subset(store, np.array([0])), tmp_path / "list.txt")
