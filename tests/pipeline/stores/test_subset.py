"""Parts of stores: held-out images, random and stratified subsets, lists, renumbered classes."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import (
    MemoryStore,
    Store,
    Subset,
    fingerprint,
    hold_out,
    open_store,
    random_subset,
    stratified_subset,
    subset_from_list,
    with_classes,
)
from tests.helpers.images import EXAMPLE_IMAGES
from tests.helpers.stores import as_records

JPEG = EXAMPLE_IMAGES["jpeg"]


def make_folder(root: Path, *names: str) -> Store:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    return open_store(root)


def test_a_subset_maps_names_bytes_and_labels(photos: Path) -> None:
    store = open_store(photos)
    chosen = np.array([41, 3, 17])
    part = pickle.loads(pickle.dumps(Subset(store, chosen)))
    assert len(part) == 3
    assert part.read_batch(np.array([2, 0])) == store.read_batch(np.array([17, 41]))
    assert [part.name(i) for i in range(3)] == [store.name(i) for i in chosen.tolist()]
    assert np.array_equal(part.index, store.index[chosen])
    assert part.classes == store.classes


def test_hold_out_splits_by_the_seed_alone(photos: Path) -> None:
    store = open_store(photos)
    train, held_out = hold_out(store, 0.2, seed=0)
    assert (len(train), len(held_out)) == (48, 12)
    assert sorted([*train.samples, *held_out.samples]) == list(range(60))
    assert np.array_equal(hold_out(store, 0.2, seed=0)[1].samples, held_out.samples)


def test_hold_out_takes_each_image_with_the_same_probability(photos: Path) -> None:
    store = open_store(photos)
    parts = [hold_out(store, 0.2, seed)[1].samples.tolist() for seed in range(200)]
    assert len({tuple(samples) for samples in parts}) == 200
    times = np.bincount(np.concatenate(parts), minlength=60)
    expected = 40
    deviation = 5.7
    assert times.min() > expected - 5 * deviation
    assert times.max() < expected + 5 * deviation


def test_hold_out_takes_at_least_one_image_and_leaves_at_least_one(photos: Path) -> None:
    store = open_store(photos)
    assert len(hold_out(store, 0.001, seed=0)[1]) == 1
    with pytest.raises(ValueError, match="leaves none to train on: use a smaller --hold-out"):
        hold_out(store, 1, seed=0)


def test_a_random_subset_is_all_of_a_small_store(photos: Path) -> None:
    store = open_store(photos)
    assert random_subset(60, store) is store
    part = random_subset(10, store)
    names = {part.name(i) for i in range(10)}
    assert len(names) == len(part) == 10
    assert names != {store.name(i) for i in range(10)}


def test_the_fingerprint_depends_on_labels_sizes_and_number(photos: Path) -> None:
    store = open_store(photos)
    digests = {fingerprint(store), fingerprint(Subset(store, np.arange(59)))}
    for field in ("label", "height", "width"):
        changed = open_store(photos)
        changed.index[field][7] += 1
        digests.add(fingerprint(changed))
    assert len(digests) == 5
    assert fingerprint(open_store(photos)) == fingerprint(store)


# Classes by name


def test_labels_are_renumbered_by_name(tmp_path: Path) -> None:
    store = make_folder(tmp_path, "wolf/1.jpg", "cat/2.jpg", "wolf/3.jpg", "ant/4.jpg")
    classes = ["ant", "bee", "wolf", "cat"]
    part = pickle.loads(pickle.dumps(with_classes(store, classes)))
    assert part.classes == classes
    for i in range(4):
        assert classes[part.index["label"][i]] == Path(part.name(i)).parent.name
    assert store.index["label"].tolist() == [0, 1, 2, 2], "the store itself is unchanged"
    assert part.read_batch(np.array([1])) == [JPEG]


def test_classes_that_training_lacks_are_named_with_an_image(tmp_path: Path) -> None:
    store = make_folder(tmp_path, *(f"class{i}/{i}.jpg" for i in range(9)))
    message = r"class2/2\.jpg: .* has classes class2, class3, class5 and 3 more"
    with pytest.raises(ValueError, match=message):
        with_classes(store, ["class0", "class1", "class4"])


def test_classes_without_images_need_not_be_known(tmp_path: Path) -> None:
    store = make_folder(tmp_path, *(f"class{i}/{i}.jpg" for i in range(9)))
    part = with_classes(Subset(store, np.array([0, 4])), ["class4", "class0"])
    assert part.index["label"].tolist() == [1, 0]


# Stratified subsets

IMAGES_OF = {"few": 3, "many": 50, "some": 20}


@pytest.fixture
def unbalanced(tmp_path: Path) -> Store:
    names = [f"{name}/{i}.jpg" for name, count in IMAGES_OF.items() for i in range(count)]
    return make_folder(tmp_path, *names)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.1, [1, 5, 2]), (0.01, [1, 1, 1]), (0.55, [2, 28, 11]), (1, [3, 50, 20])],
)
def test_a_stratified_subset_has_the_same_fraction_of_each_class(
    unbalanced: Store, fraction: float, expected: list[int]
) -> None:
    part = stratified_subset(unbalanced, fraction, seed=3)
    assert np.bincount(part.index["label"]).tolist() == expected
    assert (np.diff(part.samples) > 0).all()
    assert np.array_equal(part.samples, stratified_subset(unbalanced, fraction, seed=3).samples)


def test_a_larger_fraction_includes_a_smaller_one(unbalanced: Store) -> None:
    tenth = set(stratified_subset(unbalanced, 0.1, seed=3).samples.tolist())
    half = set(stratified_subset(unbalanced, 0.5, seed=3).samples.tolist())
    assert tenth < half


def test_each_image_of_a_class_is_chosen_with_the_same_probability(unbalanced: Store) -> None:
    times: Counter[int] = Counter()
    for seed in range(200):
        times.update(stratified_subset(unbalanced, 0.1, seed).samples.tolist())
    expected = 20
    deviation = 4.3
    for i in range(IMAGES_OF["few"], 73):
        assert expected - 5 * deviation < times[i] < expected + 5 * deviation


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_fractions_are_above_0_and_at_most_1(photos: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"the fraction of labels is {fraction:g}: "):
        stratified_subset(open_store(photos), fraction)


@pytest.mark.parametrize(
    "use",
    [lambda store: stratified_subset(store, 0.1), lambda store: with_classes(store, ["a", "b"])],
    ids=["stratified_subset", "with_classes"],
)
def test_missing_labels_are_reported_with_an_image(
    tmp_path: Path, use: Callable[[Store], Subset]
) -> None:
    no_labels = make_folder(tmp_path / "none", "1.jpg", "2.jpg")
    some_labels = make_folder(tmp_path / "some", "a/1.jpg", "b/2.jpg", "b/3.jpg")
    some_labels.index["label"][1] = -1
    for store, problem in (
        (no_labels, r"1\.jpg has no label \(2 of 2 images have none\)"),
        (some_labels, r"2\.jpg has no label"),
    ):
        message = f"{problem}: put .* one sub-folder per class"
        with pytest.raises(ValueError, match=message):
            use(store)


# Lists of images


@pytest.fixture
def imagenet_like(tmp_path: Path) -> Store:
    names = [f"n{i % 3}/n{i % 3}_{i}.JPEG" for i in range(12)]
    return make_folder(tmp_path / "data", *names, "n0/deep/x 1.JPEG")


def test_a_list_names_images_by_file_or_by_path(tmp_path: Path, imagenet_like: Store) -> None:
    list_path = tmp_path / "1percent.txt"
    list_path.write_bytes(
        b"\xef\xbb\xbfn2_5.JPEG\r\nn0/n0_3.JPEG\r\n\r\n  n1_1.JPEG \nx 1.JPEG\nn2_5.JPEG\n"
    )
    part = subset_from_list(imagenet_like, list_path)
    names = [part.name(i) for i in range(len(part))]
    expected = ["n0/deep/x 1.JPEG", "n0/n0_3.JPEG", "n1/n1_1.JPEG", "n2/n2_5.JPEG"]
    assert names == [str(tmp_path / "data" / name) for name in expected]
    assert [part.classes[label] for label in part.index["label"]] == ["n0", "n0", "n1", "n2"]


def test_a_list_can_choose_from_a_subset(tmp_path: Path, imagenet_like: Store) -> None:
    part = Subset(with_classes(imagenet_like, ["n2", "n1", "n0"]), np.array([12, 1, 0]))
    first, last = imagenet_like.name(1), imagenet_like.name(12)
    list_path = tmp_path / "list.txt"
    list_path.write_text(f"{Path(first).name}\n{Path(last).name}\n")
    chosen = subset_from_list(part, list_path)
    assert [chosen.name(i) for i in range(2)] == [last, first]


BAD_LISTS: dict[str, tuple[bytes | None, str]] = {
    "names that are not there": (
        b"2.jpg\n7.jpg\n8.jpg\nb/9.jpg\na/2.jpg\n",
        r"list\.txt: 4 of its 5 names are not in .*: 7\.jpg, 8\.jpg, b/9\.jpg and 1",
    ),
    "a name of two images": (
        b"2.jpg\n1.jpg\n",
        r"1 of its 2 names belong to several images in .*: 1\.jpg$",
    ),
    "blank lines": (b"\n \n", r"list\.txt is empty"),
    "no list": (None, r"list\.txt: No such file"),
    "noise": (bytes(range(256)), r"list\.txt: "),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    store = make_folder(tmp_path / "data", "a/1.jpg", "b/1.jpg", "b/2.jpg", "a.jpg")
    content, message = BAD_LISTS[name]
    list_path = tmp_path / "list.txt"
    if content is not None:
        list_path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        subset_from_list(store, list_path)


def test_a_path_tells_images_with_the_same_name_apart(tmp_path: Path) -> None:
    store = make_folder(tmp_path / "data", "a/1.jpg", "b/1.jpg", "b/2.jpg", "a.jpg")
    (tmp_path / "list.txt").write_text("b/1.jpg\n")
    assert subset_from_list(store, tmp_path / "list.txt").name(0).endswith("b/1.jpg")


def test_a_list_for_records_or_memory_is_refused_with_the_remedy(
    tmp_path: Path, photos: Path
) -> None:
    list_path = tmp_path / "list.txt"
    list_path.write_text("0000.jpg\n")
    for store in (as_records(open_store(photos), tmp_path), MemoryStore([JPEG])):
        message = r"list\.txt contains file names, .* use the original image folder, or a fraction"
        with pytest.raises(ValueError, match=message):
            subset_from_list(Subset(store, np.array([0])), list_path)
