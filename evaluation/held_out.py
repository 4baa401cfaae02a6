"""Images that are kept out of training: which they are, and what a network makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .rooms import experiment

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline import Batch, Loader, Store

_BANK, _QUERIES = 50_000, 10_000  # images to learn from, and to be asked about, at most


def open_stores(
    preset: str, config: experiment.Pretrain, console: experiment.Console
) -> tuple[Store, Store | None]:
    """Images to train on, and labelled ones never trained on for the kNN test (None where there are no labels)."""
    from .rooms import pipeline

    if config.data.data is not None:
        train_folder, test_folder = pipeline.find_splits(config.data.data)
    elif preset == "demo":
        train_folder, test_folder = find_demo(console)
    else:
        raise ValueError(f"{preset} needs images: --data DIR or FILE")
    train_store = open_store(train_folder, console)
    if not train_store.classes or (train_store.index["label"] < 0).any():
        lacks = (
            "images without labels"
            if train_store.classes
            else "no labels (or images beside class folders)"
        )
        console.print(f"{train_folder} has {lacks}: no kNN test, which needs them")
        return train_store, None
    if test_folder is not None:
        test_store = open_store(test_folder, console)
        if test_store.classes == train_store.classes and (test_store.index["label"] >= 0).all():
            return train_store, test_store
        console.print(
            f"{test_folder} has not the classes of {train_folder}, or images without: not used"
        )
    share = min(config.data.hold_out, _QUERIES / len(train_store))
    train_part, test_part = pipeline.hold_out(train_store, share, config.run.seed)
    console.print(
        f"{len(test_part):,} images are kept out of training for the kNN test (--hold-out)"
    )
    return train_part, test_part


def find_demo(console: experiment.Console) -> tuple[Path, Path | None]:
    """The folders of the embedded data set: to train and to test on."""
    from .rooms import pipeline

    with console.progress("drawing the demo data set, once") as bar:
        return pipeline.find_splits(pipeline.demo_folder(pipeline.cache_folder(), bar))


def open_store(path: Path, console: experiment.Console) -> Store:
    """The images at `path`; those that are left out are named."""
    from .rooms import pipeline

    with console.progress(f"indexing {path}") as bar:
        store = pipeline.open_store(path, bar)
    console.print_rejects(
        "left out", {str(path / name): reason for name, reason in store.rejects.items()}
    )
    return store


class HeldOutEvaluation:
    """The tests of a run: features of at most so many training images, asked about the held-out ones."""

    def __init__(
        self,
        train: Store,
        test: Store,
        open_loader: Callable[[Store], Loader],
        console: experiment.Console,
    ) -> None:
        """open_loader(store) gives test views, in the store's order."""
        self._train, self._test, self._open_loader, self._console = (
            train,
            test,
            open_loader,
            console,
        )

    def knn(self, features: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, float]:
        """The kNN accuracy of each function of a view, in percent."""
        from .knn import knn_accuracies

        return knn_accuracies(
            self._views(self._train, _BANK), self._views(self._test, _QUERIES), features
        )

    def online(self, feature: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """kNN's and the linear probe's accuracy of one, in percent."""
        from .knn import online_accuracies

        return online_accuracies(
            self._views(self._train, _BANK), self._views(self._test, _QUERIES), feature
        )

    def _views(self, store: Store, most: int) -> Iterator[Batch]:
        from .rooms import pipeline

        loader = self._open_loader(pipeline.random_subset(most, store))
        with self._console.progress("testing on held-out images") as bar:
            yield from experiment.counted(loader.epoch(0), len(loader), bar)
        self._console.print_rejects(
            "left out", {store.name(sample): reason for sample, reason in loader.bad.items()}
        )
