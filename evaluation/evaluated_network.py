"""The network under evaluation: its weights on a device, views of images, and a results folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .command_options import NetworkConfig
from .sibling_packages import experiment

if TYPE_CHECKING:
    from torch import Tensor

    import model
    from pipeline import Batch, Loader, Recipe, Store

_DEFAULT_SIZE = 224
_RUN_FILES = {"config.json", "metrics.jsonl"}  # a folder with both is a run of train.py
_RUN_WEIGHTS = ("checkpoint.pt", "backbone.pth", "backbone.safetensors")


class ImageFeatures(NamedTuple):
    """Features of the images of a store that can be read."""

    values: Tensor  # [n, F]
    labels: Tensor  # [n]
    samples: Tensor  # [n], positions in the store


class EvaluatedNetwork:
    """The network of a checkpoint, in evaluation mode, and loaders of images for it.

    Attributes:
        checkpoint: The file or folder that the weights were read from.
        is_demo_run: Whether that is the run of train.py on the demo data set.
        weights: Everything that was read, on the CPU.
        backbone: The network on `device`.
        size: Height and width of a view, in pixels.
        folder: The folder for results; it need not exist yet.
        setup: What results depend on; keys as in `Published.setup`.
    """

    def __init__(
        self,
        config: NetworkConfig,
        console: experiment.Console,
        *,
        decoder: str = "auto",
        threads: int | None = None,
        writes_results: bool = True,
    ) -> None:
        """Read the checkpoint, and print what it contains.

        Args:
            config: The checkpoint, the device, the size of a view and the folder for results.
            console: Where everything about this network is printed.
            decoder: Decoder of the images; see `pipeline.LoaderOptions`.
            threads: Number of decoding threads; None: one per core.
            writes_results: Whether the folder for results has to be writable.

        Raises:
            ValueError: The checkpoint cannot be read or is not a ResNet, the device does not
                exist, or the folder for results cannot be written.
        """
        if not config.checkpoint.exists():
            raise ValueError(
                f"{config.checkpoint} does not exist: name weights with --checkpoint, or run "
                "train.py first"
            )
        with console.progress_bar("loading torch"):
            import torch

            from .sibling_packages import model, pipeline
        self.console = console
        self.checkpoint = config.checkpoint
        self.is_demo_run = config.is_demo_run
        self._decoder = decoder
        self._threads = threads
        self.device = pipeline.find_device(config.device)
        self.device_name = pipeline.describe_device(self.device)
        model.prepare_device(self.device, deterministic=False)

        with console.progress_bar(f"reading {config.checkpoint}"):
            self.weights = model.read_weights(config.checkpoint)
            backbone = model.load_backbone(self.weights, config.checkpoint)
        self.backbone = backbone.to(self.device).to(memory_format=torch.channels_last).eval()
        self.size = config.size or self.weights.size or _DEFAULT_SIZE
        self.folder = _results_folder(config)
        if writes_results:
            _check_writable(self.folder)  # before the work, which may take hours

        description = _describe_backbone(backbone)
        self.setup: dict[str, Any] = {
            "backbone": description,
            "view, px": self.size,
            "pretraining epochs": self.weights.epochs,
        }
        console.print(
            f"{config.checkpoint}: {description}, {self.weights.layout}; views of {self.size} px; "
            f"{self.device_name}"
        )

    def describe_weights(self) -> dict[str, str]:
        """The origin of the weights, for the record."""
        return {"layout": self.weights.layout, "sha256": self.weights_digest()}

    def weights_digest(self) -> str:
        """The SHA-256 of the file that the weights were read from."""
        path = self.checkpoint
        if path.is_dir():
            path = path / "checkpoint.pt"
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
        """A loader of views on the network's device; `decoder` replaces the usual one."""
        from .sibling_packages import pipeline

        options = pipeline.LoaderOptions(
            batch_size=batch_size,
            decoder=decoder or self._decoder,
            threads=self._threads,
            seed=seed,
            shuffle=shuffle,
            device=self.device,
        )
        return pipeline.open_loader(store, recipe, options)

    def views(
        self, store: Store, description: str, recipe: Recipe | None = None
    ) -> Iterator[Batch]:
        """Views of all images in the store's order, with a progress bar.

        Prints the names of images that cannot be read.

        Args:
            store: The images.
            description: The text of the progress bar.
            recipe: By default the centre crop for tests.

        Raises:
            ValueError: No image can be read.
        """
        from .sibling_packages import pipeline

        loader = self.open_loader(store, recipe or pipeline.center_view(self.size))
        with self.console.progress_bar(description) as bar:
            yield from experiment.counted(loader.epoch(0), len(loader), bar)
        self.print_bad_images(loader, "left out")
        if len(loader.bad) == len(store):
            raise ValueError(
                f"none of the {len(store):,} images can be read; the first is {store.name(0)}: "
                f"{loader.bad[0]}"
            )

    def features(
        self, store: Store, description: str, recipe: Recipe | None = None
    ) -> ImageFeatures:
        """Pooled features of every image that can be read; arguments as for `views`."""
        import torch

        from .features import extract_features

        samples = []

        def views_noting_samples() -> Iterator[Batch]:
            for batch in self.views(store, description, recipe):
                samples.append(batch.samples)
                yield batch

        features, labels = extract_features(
            views_noting_samples(), {"": self.backbone}, rows=len(store)
        )
        return ImageFeatures(features[""], labels, torch.cat(samples))

    def features_of_distorted_views(self, store: Store) -> tuple[Tensor, Tensor]:
        """Features [n, F] of two views of each image, distorted as in pretraining."""
        import torch

        from .sibling_packages import pipeline

        recipe = pipeline.barlow_twins(self.size)
        features_a = []
        features_b = []
        with torch.no_grad():
            for (view_a, view_b), _, _ in self.views(store, "pairs of views", recipe):
                features_a.append(self.backbone(view_a))
                features_b.append(self.backbone(view_b))
        return torch.cat(features_a), torch.cat(features_b)

    def print_bad_images(self, loader: Loader, consequence: str) -> None:
        """Print the images that the loader could not read, and what became of them."""
        rejects = {loader.store.name(sample): reason for sample, reason in loader.bad.items()}
        self.console.print_rejects(consequence, rejects)


def _results_folder(config: NetworkConfig) -> Path:
    """--output if it is given, else the folder of the run, else runs/CHECKPOINT_STEM."""
    if config.output is not None:
        return config.output
    checkpoint = config.checkpoint
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    # Folders of other projects may have one of the files.
    is_run = {entry.name for entry in run.iterdir()} >= _RUN_FILES
    folder = run if is_run else Path("runs") / checkpoint.stem
    if folder == checkpoint.parent and checkpoint.name not in _RUN_WEIGHTS:
        # Weights of an earlier step, or fine-tuned since: they have results of their own.
        folder = folder / checkpoint.stem
    return folder


def _check_writable(folder: Path) -> None:
    """ValueError if the folder cannot be created or written to."""
    candidates = (folder, *folder.absolute().parents)
    existing = next(path for path in candidates if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{existing} is not a folder that can be written to: name another with --output"
        )


def _describe_backbone(backbone: model.Backbone) -> str:
    description = backbone.name
    if backbone.width != 64:
        description += f" of width {backbone.width}"
    if backbone.conv1.kernel_size == (3, 3):
        description += " with a small stem"
    return description
