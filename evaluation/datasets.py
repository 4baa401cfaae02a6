"""Opening the images of an evaluation: training and test set, the demo data set, VOC2007."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .command_options import ImagesConfig
from .sibling_packages import experiment

if TYPE_CHECKING:
    from pipeline import Store, Subset

_DEMO_IMAGES = 8  # demo images that `predict` shows if no image is named


def open_store(path: Path, console: experiment.Console) -> Store:
    """The images at `path`; prints the names of those that cannot be read."""
    from .sibling_packages import pipeline

    with console.progress_bar(f"indexing {path}") as bar:
        store = pipeline.open_store(path, bar)
    rejects = {str(path / name): reason for name, reason in store.rejects.items()}
    console.print_rejects("left out", rejects)
    return store


def open_labelled_splits(images: ImagesConfig, console: experiment.Console) -> tuple[Store, Store]:
    """A labelled training set and a test set of the same classes; by default the demo data set.

    Raises:
        ValueError: There is no test set, an image has no label, or the test set has a class that
            the training set does not have.
    """
    from .sibling_packages import pipeline

    train_path: Path
    test_path: Path | None
    if images.train is None:
        train_path, test_path = find_demo_splits(console)
    else:
        train_path, test_path = pipeline.find_splits(images.train)
    test_path = images.test or test_path
    if test_path is None:
        raise ValueError(
            f"{train_path} has no val/ or test/ beside its train/: name a test set with --test"
        )

    train = open_store(train_path, console)
    test = open_store(test_path, console)
    pipeline.check_labels(train)
    pipeline.check_labels(test)
    return train, pipeline.with_classes(test, train.classes)


def labelled_subset(train: Store, labels: str, seed: int) -> Subset:
    """The images of the training set whose labels semi-supervised training may use.

    Args:
        train: The whole training set.
        labels: A fraction of each class, or the path of a file with the name of an image a line.
        seed: Decides which images of a class a fraction selects.

    Raises:
        ValueError: `labels` is neither, or the file names an image that is not in `train`.
    """
    from .sibling_packages import pipeline

    try:
        fraction = float(labels)
    except ValueError:
        path = Path(labels)
        if not path.is_file():
            raise ValueError(
                f"--labels {labels} is neither a fraction nor an existing file"
            ) from None
        return pipeline.subset_from_list(train, path)
    return pipeline.stratified_subset(train, fraction, seed)


def find_demo_splits(console: experiment.Console) -> tuple[Path, Path]:
    """The folders of the demo data set's training and test images, drawn on first use."""
    from .sibling_packages import pipeline

    with console.progress_bar("generating demo images (only the first time)") as bar:
        folder = pipeline.demo_folder(pipeline.cache_folder(), bar)
    train, test = pipeline.find_splits(folder)
    assert test is not None
    return train, test


def demo_test_images(console: experiment.Console) -> list[Path]:
    """A few test images of the demo data set, one from each of its first classes."""
    _, test = find_demo_splits(console)
    classes = sorted(test.iterdir())[:_DEMO_IMAGES]
    return [min(folder.iterdir()) for folder in classes]


def find_devkit(voc07: Path | None, console: experiment.Console) -> Path:
    """The folder that contains VOCdevkit; by default one made of demo images on first use."""
    from .sibling_packages import pipeline

    if voc07 is not None:
        return voc07
    with console.progress_bar("generating VOC-like demo images (only the first time)") as bar:
        demo = find_demo_splits(console)[0].parent
        return pipeline.demo_devkit(pipeline.cache_folder(), demo, bar)
