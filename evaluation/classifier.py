"""What a network says about an image: `load_classifier`, for other programs, and the verb that prints it.

from twinfeed.evaluation import load_classifier

classifier = load_classifier("runs/demo", train="photos")
classifier.predict("cat.jpg")       # {"pred_class": "cat", "pred_label": 3, "pred_score": 0.93}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluated_network import EvaluatedNetwork
from .held_out import find_demo, open_store
from .protocols import DEMO_RUN, Network
from .rooms import experiment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    Picture = str | Path | Image.Image | NDArray[np.uint8]

_BANK = 50_000  # training images among which neighbours are looked for, at most
_TOGETHER = 64  # images in one pass
NEIGHBOURS = 5  # that are shown


class Classifier:
    """Classes of images, by the linear classifier of a checkpoint or by a vote among labelled images."""

    def __init__(
        self,
        subject: EvaluatedNetwork,
        train: Path | None,
        *,
        k: int,
        temperature: float,
        neighbours: bool = False,
    ) -> None:
        """train: folder (or file) of labelled images; needed for a vote, and for `neighbours`.

        ValueError where the checkpoint has no classifier and there are no images with labels.
        """
        from .rooms import pipeline

        self._subject, self._k, self._temperature = subject, k, temperature
        self._head, self.classes = subject.weights.head, subject.weights.classes
        self.how = "the checkpoint's linear classifier"
        self._bank: Tensor | None = None
        if self._head and not neighbours:
            return
        if train is None and subject.checkpoint == DEMO_RUN:
            train = find_demo(subject.console)[0]
        if train is None:
            raise ValueError(
                "name the images among which neighbours are looked for, with --train"
                if self._head
                else f"{subject.checkpoint} has no classifier: name images with labels that vote, with --train, or "
                "train one, with evaluate.py linear"
            )
        store = open_store(pipeline.find_splits(train)[0], subject.console)
        self._store = pipeline.random_subset(_BANK, store)
        if not self._head:
            pipeline.check_labels(store)
            self.classes = self._store.classes
            self.how = f"a vote of the {k} most alike of {len(self._store):,} training images"
        self._bank, self._bank_labels, self._bank_samples = subject.features(
            self._store, f"looking at {train}"
        )

    def predict(self, image: Picture) -> dict[str, Any]:
        """`pred_class` (its name), `pred_label` (its number) and `pred_score` (0 to 1) of one image.

        image: a path, a PIL image, or an array, uint8 [H, W, 3] RGB or [H, W] grey. ValueError where it is none.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Picture]) -> list[dict[str, Any]]:
        """The same for each of several."""
        return self.explain(images, 0)

    def explain(
        self, images: Sequence[Picture], neighbours: int = NEIGHBOURS
    ) -> list[dict[str, Any]]:
        """The same with `neighbours`: so many of the training images most like each (image, pred_class, similarity)."""
        import torch

        from .features import extract
        from .knn import knn_votes
        from .knn import neighbours as nearest_neighbours
        from .rooms import pipeline

        explained = []
        for first in range(0, len(images), _TOGETHER):
            part = images[first : first + _TOGETHER]
            names = [str(image) if isinstance(image, str | Path) else "the image" for image in part]
            store = pipeline.MemoryStore([pipeline.encoded_bytes(image) for image in part], names)
            view = pipeline.center_view(self._subject.size)
            loader = self._subject.open_loader(
                store, view, _TOGETHER, decoder="torchvision"
            )  # DALI starts slowly
            found, _ = extract(loader.epoch(0), {"": self._subject.backbone})
            for sample, reason in loader.bad.items():
                raise ValueError(f"{names[sample]}: {reason}")
            if self._bank is not None:
                similarity, nearest = nearest_neighbours(
                    self._bank, found[""], max(self._k, neighbours)
                )
            if self._head:
                weight, bias = (self._head[name].to(found[""]) for name in ("weight", "bias"))
                scores = torch.nn.functional.linear(found[""], weight, bias).softmax(1)
            else:
                votes = similarity[:, : self._k], self._bank_labels[nearest[:, : self._k]]
                scores = knn_votes(*votes, len(self.classes), self._temperature)
            for row, score in enumerate(scores):
                label = int(score.argmax())
                says = {
                    "pred_class": self._name(label),
                    "pred_label": label,
                    "pred_score": float(score[label]),
                }
                if neighbours:
                    says["neighbours"] = self._said(
                        similarity[row, :neighbours], nearest[row, :neighbours]
                    )
                explained.append(says)
        return explained

    def _said(self, similarity: Tensor, nearest: Tensor) -> list[dict[str, Any]]:
        names = self._store.classes
        return [
            {
                "image": self._store.name(int(self._bank_samples[position])),
                "pred_class": names[label]
                if (label := int(self._bank_labels[position])) >= 0
                else None,
                "similarity": value,
            }
            for value, position in zip(similarity.tolist(), nearest.tolist(), strict=True)
        ]

    def _name(self, label: int) -> str:
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
    """A classifier from a checkpoint: with a linear classifier in it (evaluate.py linear leaves one), or with `train`.

    train: images with labels, of which the `k` most alike vote, each with exp(cosine similarity / temperature).
    size: side of the view, pixels; default: what the checkpoint says, else 224. ValueError for what cannot be read.
    """
    network = Network(Path(checkpoint), size=size, device=device)
    console = experiment.Console()
    console.quiet = True
    subject = EvaluatedNetwork(network, console, writes=False)
    return Classifier(subject, None if train is None else Path(train), k=k, temperature=temperature)
