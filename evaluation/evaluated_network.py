"""What is evaluated: a network on its device, the images that it is shown, and the folder for what is found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .held_out import find_demo, open_store
from .protocols import DEMO_RUN, Images, Network
from .rooms import experiment

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline import Batch, Loader, Recipe, Store


class EvaluatedNetwork:
    """The network of a checkpoint, in evaluation mode, and views of images for it."""

    def __init__(
        self,
        config: Network,
        console: experiment.Console,
        decoder: str = "auto",
        threads: int | None = None,
        writes: bool = True,
    ) -> None:
        """ValueError for a checkpoint that cannot be read or is no ResNet, a device that is not there, or, with
        `writes`, results that could not be kept."""
        if config.checkpoint == DEMO_RUN and not DEMO_RUN.exists():
            raise ValueError(
                f"{DEMO_RUN} is not there: run train.py first, or name weights with --checkpoint"
            )
        with console.progress("loading torch"):
            import torch

            from .rooms import model, pipeline
        self.console, self.checkpoint, self._decoder, self._threads = (
            console,
            config.checkpoint,
            decoder,
            threads,
        )
        self.device = pipeline.find_device(config.device)
        self.device_name = pipeline.describe_device(self.device)
        model.prepare_device(self.device, deterministic=False)
        with console.progress(f"reading {config.checkpoint}"):
            self.weights = model.read_weights(config.checkpoint)
            backbone = model.load_backbone(self.weights, config.checkpoint)
        self.backbone = backbone.to(self.device).to(memory_format=torch.channels_last).eval()
        self.size = config.size or self.weights.size or 224
        path = config.checkpoint
        ours = path if path.is_dir() else path.parent
        is_run = {"config.json", "metrics.jsonl"} <= {
            entry.name for entry in ours.iterdir()
        }  # others have one of them
        run = ours if is_run else Path("runs") / path.stem
        if run == path.parent and path.name not in (
            "checkpoint.pt",
            "backbone.pth",
            "backbone.safetensors",
        ):
            run = (
                run / path.stem
            )  # weights of an earlier step, or tuned since: results of their own
        self.folder = config.output or run
        there = next(
            path for path in (self.folder, *self.folder.absolute().parents) if path.exists()
        )
        if writes and not (
            there.is_dir() and os.access(there, os.W_OK)
        ):  # known now, not after hours
            raise ValueError(
                f"{there} is no folder that can be written to: name another with --output"
            )
        name = backbone.name + f" of width {backbone.width}" * (backbone.width != 64)
        name += " with a small stem" * (backbone.conv1.kernel_size == (3, 3))
        self.setup: dict[str, Any] = {"backbone": name, "view, px": self.size}
        self.setup["pretraining epochs"] = self.weights.epochs
        console.print(
            f"{config.checkpoint}: {name}, {self.weights.layout}; views of {self.size} px; {self.device_name}"
        )

    def about(self, stores: dict[str, Store]) -> dict[str, Any]:
        """For the record: the weights and the images, by digests."""
        from .rooms import pipeline

        images = {
            name: {
                "images": len(store),
                "classes": len(store.classes),
                "fingerprint": pipeline.fingerprint(store),
            }
            for name, store in stores.items()
        }
        return {
            "weights": {"layout": self.weights.layout, "sha256": self.digest()},
            "images": images,
        }

    def digest(self) -> str:
        """Of the file that the weights were read from."""
        path = self.checkpoint / "checkpoint.pt" if self.checkpoint.is_dir() else self.checkpoint
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def open_loader(
        self,
        store: Store,
        recipe: Recipe,
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        seed: int = 0,
        decoder: str | None = None,
    ) -> Loader:
        from .rooms import pipeline

        return pipeline.open_loader(
            store,
            recipe,
            pipeline.LoaderOptions(
                batch_size=batch_size,
                decoder=decoder or self._decoder,
                threads=self._threads,
                seed=seed,
                shuffle=shuffle,
                device=self.device,
            ),
        )

    def views(self, store: Store, what: str, recipe: Recipe | None = None) -> Iterator[Batch]:
        """Each image of `store` once, in order, as a test view, or by `recipe`; those that cannot be read are named."""
        from .rooms import pipeline

        loader = self.open_loader(store, recipe or pipeline.center_view(self.size))
        with self.console.progress(what) as bar:
            yield from experiment.counted(loader.epoch(0), len(loader), bar)
        self.say_bad(loader, "left out")
        if len(loader.bad) == len(store):
            raise ValueError(
                f"none of the {len(store):,} images can be read, the first: {store.name(0)}"
            )

    def say_bad(self, loader: Loader, what: str) -> None:
        self.console.print_rejects(
            what, {loader.store.name(sample): reason for sample, reason in loader.bad.items()}
        )

    def features(
        self, store: Store, what: str, recipe: Recipe | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features [n, F] of every image that can be read, its label [n] and its position in the store [n]."""
        import torch

        from .features import extract

        samples = []

        def noted() -> Iterator[Batch]:
            for batch in self.views(store, what, recipe):
                samples.append(batch.samples)
                yield batch

        found, labels = extract(noted(), {"": self.backbone}, rows=len(store))
        return found[""], labels, torch.cat(samples)


def open_images(images: Images, console: experiment.Console) -> tuple[Store, Store]:
    """Labelled images to learn from and to be asked about, with the same classes; by default the demo's.

    ValueError where there is no test set, no labels, or a class in it that cannot be learned.
    """
    from .rooms import pipeline

    train, test = find_demo(console) if images.train is None else pipeline.find_splits(images.train)
    test = images.test or test
    if test is None:
        raise ValueError(
            f"{train} has no val/ or test/ beside its train/: name images to test on with --test"
        )
    stores = open_store(train, console), open_store(test, console)
    for store in stores:
        pipeline.check_labels(store)
    return stores[0], pipeline.with_classes(stores[1], stores[0].classes)
