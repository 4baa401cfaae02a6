"""Held-out images of a pretraining run: which images they are, and the tests on them.

train.py opens its images here. Labelled images that the run never trains on are the queries of a
kNN vote, and training images are its bank. `knn.py` and `linear_probe.py` have the computations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .datasets import find_demo_splits, open_store
from .sibling_packages import experiment

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline import Batch, Loader, Store

_MOST_BANK_IMAGES = 50_000
_MOST_QUERIES = 10_000


def open_stores(
    preset: str, config: experiment.Pretrain, console: experiment.Console
) -> tuple[Store, Store | None]:
    """The training images, and labelled images that are never trained on.

    The held-out images are the test split if there is one with the same classes, else a fraction
    of the training images. They are None if the training images have no labels.

    Raises:
        ValueError: The preset needs images and --data is not given, or they cannot be read.
    """
    from .sibling_packages import pipeline

    train_path, test_path = _find_splits(preset, config.data, console)
    train = open_store(train_path, console)
    if not _has_labels(train):
        problem = "no labels (there are no class folders, or images lie beside them)"
        if train.classes:
            problem = "images without labels"
        console.print(f"no kNN test: {train_path} has {problem}")
        return train, None

    if test_path is not None:
        test = open_store(test_path, console)
        if _has_labels(test) and test.classes == train.classes:
            return train, test
        console.print(
            f"{test_path} is not used: it has other classes than {train_path}, or images without "
            "labels"
        )

    fraction = min(config.data.hold_out, _MOST_QUERIES / len(train))
    train_part, held_out = pipeline.hold_out(train, fraction, config.run.seed)
    console.print(
        f"{len(held_out):,} images are held out from training for the kNN test (--hold-out)"
    )
    return train_part, held_out


class HeldOutEvaluation:
    """The kNN test and the linear probe of a run, on its held-out images."""

    def __init__(
        self,
        train: Store,
        test: Store,
        open_loader: Callable[[Store], Loader],
        console: experiment.Console,
    ) -> None:
        """Prepare the evaluation; nothing is read yet.

        Args:
            train: The training images; at most 50,000 of them are the bank.
            test: The held-out images; at most 10,000 of them are the queries.
            open_loader: Returns a loader of test views, in the store's order.
            console: Shows the progress and the images that cannot be read.
        """
        self._train = train
        self._test = test
        self._open_loader = open_loader
        self._console = console

    def knn(self, features: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, float]:
        """The kNN top-1 accuracy, in percent, of each feature: functions of a view."""
        from .knn import knn_accuracies

        return knn_accuracies(self._bank_views(), self._query_views(), features)

    def online(self, feature: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`knn_top1` and `probe_top1` of one feature, in percent, to follow during training."""
        from .linear_probe import online_accuracies

        return online_accuracies(self._bank_views(), self._query_views(), feature)

    def _bank_views(self) -> Iterator[Batch]:
        return self._views(self._train, _MOST_BANK_IMAGES)

    def _query_views(self) -> Iterator[Batch]:
        return self._views(self._test, _MOST_QUERIES)

    def _views(self, store: Store, most: int) -> Iterator[Batch]:
        """Test views of at most `most` images; prints those that cannot be read."""
        from .sibling_packages import pipeline

        loader = self._open_loader(pipeline.random_subset(most, store))
        with self._console.progress_bar("testing on held-out images") as bar:
            yield from experiment.counted(loader.epoch(0), len(loader), bar)
        rejects = {store.name(sample): reason for sample, reason in loader.bad.items()}
        self._console.print_rejects("left out", rejects)


def _find_splits(
    preset: str, data: experiment.DataConfig, console: experiment.Console
) -> tuple[Path, Path | None]:
    from .sibling_packages import pipeline

    if data.data is not None:
        return pipeline.find_splits(data.data)
    if data.demo_data:
        return find_demo_splits(console)
    raise ValueError(f"{preset} needs images: --data DIR or FILE")


def _has_labels(store: Store) -> bool:
    """Whether every image has a label."""
    return bool(store.classes) and bool((store.index["label"] >= 0).all())
