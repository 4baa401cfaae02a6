"""Classes of images, by a pretrained network: `load_classifier`, for other programs.

    from twinfeed.evaluation import load_classifier

    classifier = load_classifier("runs/demo", train="photos")
    classifier.predict("cat.jpg")  # {"pred_class": "cat", "pred_label": 3, "pred_score": 0.93}

`evaluate.py predict` prints the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_options import NetworkConfig
from .datasets import find_demo_splits, open_store
from .evaluated_network import EvaluatedNetwork, ImageFeatures
from .sibling_packages import experiment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from pipeline import Store

    ImageInput = str | Path | Image.Image | NDArray[np.uint8]

NEIGHBOURS_SHOWN = 5

_MOST_BANK_IMAGES = 50_000
_BATCH_SIZE = 64


@dataclass(frozen=True)
class _Bank:
    """Training images and their features, for kNN."""

    store: Store
    features: ImageFeatures

    def describe_neighbours(self, similarities: Tensor, positions: Tensor) -> list[dict[str, Any]]:
        """Name, class and cosine similarity of the images at these positions, [k] each."""
        neighbours = []
        for similarity, position in zip(similarities.tolist(), positions.tolist(), strict=True):
            sample = int(self.features.samples[position])
            label = int(self.features.labels[position])
            neighbours.append(
                {
                    "image": self.store.name(sample),
                    "pred_class": self.store.classes[label] if label >= 0 else None,
                    "similarity": similarity,
                }
            )
        return neighbours


class Classifier:
    """Predicts classes by the linear classifier of a checkpoint, or by a kNN vote.

    Attributes:
        classes: The names of the classes; [] if the checkpoint has none.
        method: How classes are predicted, in words.
    """

    def __init__(
        self,
        network: EvaluatedNetwork,
        train: Path | None,
        *,
        k: int,
        temperature: float,
        neighbours: bool = False,
    ) -> None:
        """Prepare the classifier; computes the features of the bank if one is needed.

        Args:
            network: The network, and maybe a linear classifier with it.
            train: Labelled images, the bank; needed for the vote and for `neighbours`.
            k: The number of neighbours that vote.
            temperature: Each votes with weight exp(cosine similarity / temperature).
            neighbours: Whether `explain` is called with neighbours.

        Raises:
            ValueError: A bank is needed and `train` is not given or has an image without a label.
        """
        self._network = network
        self._k = k
        self._temperature = temperature
        self._head = network.weights.head
        self._bank: _Bank | None = None
        if not self._head or neighbours:
            self._bank = self._load_bank(train)

        if self._head:
            self.classes = network.weights.classes
            self.method = "the checkpoint's linear classifier"
        else:
            assert self._bank is not None
            self.classes = self._bank.store.classes
            self.method = f"a vote of the {k} nearest of {len(self._bank.store):,} training images"

    def predict(self, image: ImageInput) -> dict[str, Any]:
        """The class of one image.

        Args:
            image: A path, a PIL image, or an array, uint8 [H, W, 3] RGB or [H, W] grey.

        Returns:
            `pred_class` (its name), `pred_label` (its number) and `pred_score` (0 to 1).

        Raises:
            ValueError: The image cannot be read.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[ImageInput]) -> list[dict[str, Any]]:
        """The class of each image; see `predict`."""
        return self.explain(images, neighbours=0)

    def explain(
        self, images: Sequence[ImageInput], neighbours: int = NEIGHBOURS_SHOWN
    ) -> list[dict[str, Any]]:
        """The class of each image, with the training images that are nearest to it.

        Each result is that of `predict` and a list `neighbours`, with `image`, `pred_class` and
        `similarity` of each.
        """
        results = []
        for first in range(0, len(images), _BATCH_SIZE):
            features = self._features(images[first : first + _BATCH_SIZE])
            results += self._explain_features(features, neighbours)
        return results

    def _load_bank(self, train: Path | None) -> _Bank:
        from .sibling_packages import pipeline

        if train is None:
            train = self._default_train()
        store = open_store(pipeline.find_splits(train)[0], self._network.console)
        bank = pipeline.random_subset(_MOST_BANK_IMAGES, store)
        if not self._head:
            pipeline.check_labels(store)
        return _Bank(bank, self._network.features(bank, f"features of {train}"))

    def _default_train(self) -> Path:
        """The training images of the demo run; ValueError for other networks."""
        if self._network.is_demo_run:
            return find_demo_splits(self._network.console)[0]
        if self._head:
            raise ValueError("--neighbours needs --train: the images to search")
        raise ValueError(
            f"{self._network.checkpoint} has no classifier: name labelled images with --train for "
            "a kNN vote, or train a classifier with evaluate.py linear"
        )

    def _features(self, images: Sequence[ImageInput]) -> Tensor:
        """Features [B, F] of a few images; ValueError for one that cannot be read."""
        from .features import extract_features
        from .sibling_packages import pipeline

        names = [str(image) if isinstance(image, str | Path) else "the image" for image in images]
        store = pipeline.MemoryStore([pipeline.encoded_bytes(image) for image in images], names)
        # Not DALI, which takes seconds to start.
        loader = self._network.open_loader(
            store, pipeline.center_view(self._network.size), _BATCH_SIZE, decoder="cpu"
        )
        features, _ = extract_features(loader.epoch(0), {"": self._network.backbone})
        if loader.bad:
            sample, reason = next(iter(loader.bad.items()))
            raise ValueError(f"{names[sample]}: {reason}")
        return features[""]

    def _explain_features(self, features: Tensor, neighbours: int) -> list[dict[str, Any]]:
        from .knn import knn_votes, nearest_neighbours

        if self._bank is not None:
            similarities, positions = nearest_neighbours(
                self._bank.features.values, features, max(self._k, neighbours)
            )
        if self._head:
            scores = self._head_scores(features)
        else:
            assert self._bank is not None
            voters = positions[:, : self._k]
            scores = knn_votes(
                similarities[:, : self._k],
                self._bank.features.labels[voters],
                len(self.classes),
                self._temperature,
            )

        results = []
        for row, image_scores in enumerate(scores):
            label = int(image_scores.argmax())
            result: dict[str, Any] = {
                "pred_class": self._class_name(label),
                "pred_label": label,
                "pred_score": float(image_scores[label]),
            }
            if neighbours:
                assert self._bank is not None
                result["neighbours"] = self._bank.describe_neighbours(
                    similarities[row, :neighbours], positions[row, :neighbours]
                )
            results.append(result)
        return results

    def _head_scores(self, features: Tensor) -> Tensor:
        """The softmax of the linear classifier's outputs, [B, C]."""
        import torch

        weight = self._head["weight"].to(features)
        bias = self._head["bias"].to(features)
        return torch.nn.functional.linear(features, weight, bias).softmax(1)

    def _class_name(self, label: int) -> str:
        return self.classes[label] if self.classes else str(label)


def load_classifier(
    checkpoint: str | Path,
    train: str | Path | None = None,
    *,
    size: int | None = None,
    device: str = "auto",
    k: int = 20,
    temperature: float = 0.07,
) -> Classifier:
    """Load a classifier from a checkpoint.

    Args:
        checkpoint: Folder of a run or file of weights. `evaluate.py linear` and `semisup` write
            files that contain a linear classifier.
        train: Labelled images for a kNN vote, if the checkpoint has no classifier.
        size: Height and width of a view, in pixels; default: as in the checkpoint, else 224.
        device: auto, cpu, cuda or cuda:N.
        k: The number of neighbours that vote.
        temperature: Each votes with weight exp(cosine similarity / temperature).

    Raises:
        ValueError: The checkpoint or the images cannot be read, or there is neither a classifier
            in the checkpoint nor `train`.
    """
    network_config = NetworkConfig(Path(checkpoint), size=size, device=device)
    console = experiment.Console()
    console.quiet = True
    network = EvaluatedNetwork(network_config, console, writes_results=False)
    train_path = None if train is None else Path(train)
    return Classifier(network, train_path, k=k, temperature=temperature)
