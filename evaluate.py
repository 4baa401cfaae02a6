"""What pretrained weights are worth, by the evaluations of the paper, and what they say about an image.

uv run evaluate.py knn                                                     the last demo run, the embedded data set
uv run evaluate.py linear --checkpoint resnet50.pth --train imagenet       anybody's weights, your images
uv run evaluate.py semisup --checkpoint runs/a --train imagenet --labels 1percent.txt
uv run evaluate.py svm --checkpoint runs/a --voc07 data
uv run evaluate.py predict --checkpoint runs/a/linear-imagenet.safetensors cat.jpg dog.jpg
uv run evaluate.py export --checkpoint runs/a --to timm
uv run evaluate.py compare runs/a runs/b
uv run evaluate.py --help
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

import experiment
from evaluation import protocols
from evaluation.classifier import NEIGHBOURS, Classifier, load_classifier
from evaluation.evaluated_network import EvaluatedNetwork, open_images
from evaluation.held_out import find_demo
from evaluation.protocols import Compare, Export, Knn, Linear, Predict, Semisup, Svm
from evaluation.results import compare, record
from experiment import Console, printable

experiment.set_thread_environment()

if TYPE_CHECKING:
    import torch
    from torch import nn

    from evaluation import Tuning
    from pipeline import Batch, Store

__all__ = ["load_classifier"]

_PAIRS = 10_000  # images of which two distorted views are compared, at most
_SHOWN = 8  # images of the embedded data set that are predicted where none are named


def main(console: Console) -> int:
    """What the command line asks for; the exit status."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("evaluate.py is one process, on one device: start it without torchrun")
    job = protocols.parse()
    protocols.check(job)
    if isinstance(job, Compare):
        return compare(job.runs, console)
    verbs: dict[type, Callable[[Any, Console], int]] = {
        Knn: knn,
        Linear: linear,
        Semisup: semisup,
        Svm: svm,
    }
    verbs |= {Predict: predict, Export: export}
    return verbs[type(job)](job, console)


def knn(job: Knn, console: Console) -> int:
    """k nearest neighbours, and what can be read from features without labels."""
    subject = EvaluatedNetwork(job.network, console, job.images.decoder, job.images.threads)
    import torch

    import evaluation
    import pipeline

    train, test = open_images(job.images, console)
    bank, bank_labels, _ = subject.features(train, "features of those that vote")
    queries, labels, _ = subject.features(test, "features of those that are asked about")
    accuracy = evaluation.knn_accuracy(bank, bank_labels, queries, labels, job.k, job.temperature)
    some, recipe = (
        pipeline.random_subset(_PAIRS, test, job.images.seed),
        pipeline.barlow_twins(subject.size),
    )
    with torch.no_grad():
        pairs = [
            [subject.backbone(view) for view in views]
            for views, *_ in subject.views(some, "pairs", recipe)
        ]
    found = {f"knn_{name}": value for name, value in accuracy.items()}
    found["effective_rank"] = evaluation.effective_rank(bank)
    found["alignment"] = evaluation.feature_alignment(
        *(torch.cat(view) for view in zip(*pairs, strict=True))
    )
    found["uniformity"] = evaluation.feature_uniformity(queries)
    setup = counts(train) | {"k": job.k, "temperature": job.temperature}
    record(
        subject, "knn", job, found, setup, protocols.KNN_PUBLISHED, {"train": train, "test": test}
    )
    return 0


def linear(job: Linear, console: Console) -> int:
    """Linear classifiers on the frozen network; the best is kept for `predict`."""
    subject = EvaluatedNetwork(job.network, console, job.images.decoder, job.images.threads)
    import torch

    import evaluation

    train, test = open_images(job.images, console)
    (preset, protocol), heads = job.protocol(), tuple(job.heads())
    name = f"linear-{preset}" + "-sweep" * (len(heads) > 1)
    tuning = evaluation.Tuning(protocol.epochs, heads, milestones=protocol.milestones or None)
    amp_dtype = getattr(torch, job.precision)
    trained = tune(subject, job, name, train, tuning, job.batch_size, amp_dtype)
    scores = evaluation.accuracies(
        subject.backbone, trained, subject.views(test, "testing"), amp_dtype
    )
    best = max(
        range(len(heads)),
        key=lambda i: scores[i]["top1"] if math.isfinite(scores[i]["loss"]) else -1,
    )
    each = [
        {"lr": lr, "weight decay": decay} | score
        for (lr, decay), score in zip(heads, scores, strict=True)
    ]
    setup = counts(train) | {"batch": job.batch_size, "precision": job.precision} | protocol.setup
    setup |= {name: each[best][name] for name in ("lr", "weight decay")} | {
        "classifiers tried": len(heads)
    }
    stores = {"train": train, "test": test}
    kept = keep(subject, trained[best], scores[best], train, f"{name}.safetensors")
    record(subject, name, job, scores[best], setup, job.published(), stores, heads=each)
    if len(heads) > 1:
        figures = {f"lr {h['lr']:g}, weight decay {h['weight decay']:g}": h for h in each}
        console.table({pair: f"{h['top1']:.2f} / {h['top5']:.2f}" for pair, h in figures.items()})
        console.print(
            "The best was chosen by the images that it was tested on, which makes its figure a little high."
        )
    done(subject, kept)
    return 0


def semisup(job: Semisup, console: Console) -> int:
    """The network and a new classifier tuned on few labels."""
    subject = EvaluatedNetwork(job.network, console, job.images.decoder, job.images.threads)
    import evaluation
    import pipeline

    train, test = open_images(job.images, console)
    try:
        fraction = float(job.labels)
    except ValueError:
        if not Path(job.labels).is_file():
            raise ValueError(
                f"--labels {job.labels}: neither a fraction nor a file that is there"
            ) from None
        labelled = pipeline.subset_from_list(train, Path(job.labels))
    else:
        labelled = pipeline.stratified_subset(train, fraction, job.images.seed)
    share, (_, protocol) = len(labelled) / len(train), job.protocol()
    name = f"semisup-{100 * share:.3g}percent"
    milestones = protocol.milestones or None
    heads = ((protocol.lr, 0.0),)
    tuning = evaluation.Tuning(
        protocol.epochs, heads, 0.9, protocol.backbone_lr, milestones, gamma=0.2
    )
    (head,) = tune(subject, job, name, labelled, tuning, protocol.batch_size)
    (score,) = evaluation.accuracies(subject.backbone, [head], subject.views(test, "testing"))
    setup = counts(train) | {"labelled images": len(labelled)} | protocol.setup
    stores = {"train": train, "labelled": labelled, "test": test}
    kept = keep(subject, head, score, train, f"{name}.safetensors")
    record(subject, name, job, score, setup, job.published(share), stores)
    done(subject, kept)
    return 0


def svm(job: Svm, console: Console) -> int:
    """A support vector machine for each class of VOC2007."""
    # The pictures of the embedded kit show several of the demo's images, each of 48 pixels.
    size = job.network.size or (None if job.voc07 else 144)
    subject = EvaluatedNetwork(replace(job.network, size=size), console, job.decoder, job.threads)
    import evaluation
    import pipeline

    if (root := job.voc07) is None:
        with console.progress("drawing a development kit, once") as bar:
            root = pipeline.demo_devkit(pipeline.cache_folder(), find_demo(console)[0].parent, bar)
    stores: dict[str, Store] = {}
    seen = {}
    for split in ("trainval", "test"):
        stores[split], targets, classes = pipeline.open_voc(root, split)
        features, _, samples = subject.features(
            stores[split], f"features of {split}", pipeline.whole_view(subject.size)
        )
        seen[split] = features, targets[samples.numpy()]
    with console.progress("support vector machines") as bar:
        jobs = (
            (job.threads or pipeline.usable_cores()) if job.voc07 else 1
        )  # to start more takes longer than the fits
        fitted = evaluation.svm_map(
            *seen["trainval"], *seen["test"], classes, jobs=jobs, progress=bar
        )
    each = {
        name: {"average_precision": precision, "C": cost}
        for name, precision, cost in zip(
            classes, fitted.average_precisions, fitted.costs, strict=True
        )
    }
    setup = {
        "training images": len(stores["trainval"]),
        "test images": len(stores["test"]),
        "classes": len(classes),
    }
    found = {"map": fitted.mean_average_precision}
    record(subject, "svm", job, found, setup, protocols.SVM_PUBLISHED, stores, each=each)
    console.table(
        {name: f"{one['average_precision']:.2f} (C {one['C']:g})" for name, one in each.items()}
    )
    if fitted.not_converged:
        console.print(
            f"{fitted.not_converged} of {fitted.fits} fits had not converged after 2,000 iterations"
        )
    return 0


def predict(job: Predict, console: Console) -> int:
    """Classes and scores of images."""
    console.quiet |= job.json
    console.rich.stderr = job.json  # what is said even so: which training images could not be read
    if not job.pictures and job.network.checkpoint != protocols.DEMO_RUN:
        raise ValueError("name images to predict: evaluate.py predict --checkpoint W IMAGE...")
    subject = EvaluatedNetwork(job.network, console, writes=False)
    if lacking := [
        path for path in job.pictures if not path.exists() or path.is_dir()
    ]:  # before others are looked at
        raise ValueError(f"{lacking[0]} is no file: name images to predict")
    classifier = Classifier(
        subject, job.train, k=job.k, temperature=job.temperature, neighbours=job.neighbours
    )
    pictures = job.pictures or tuple(demo_pictures(console))
    found = classifier.explain(pictures, NEIGHBOURS * job.neighbours)
    if job.json:
        both = zip(pictures, found, strict=True)
        print(json.dumps([{"image": str(path)} | values for path, values in both], indent=2))
        return 0
    table = Table(
        Column("image", overflow="fold"),
        "class",
        "score",
        box=None,
        pad_edge=False,
        header_style="",
    )
    for path, values in zip(pictures, found, strict=True):
        table.add_row(
            Text(printable(str(path))), Text(values["pred_class"]), f"{values['pred_score']:.3f}"
        )
        for near in values.get("neighbours", ()):
            name = Text(f"  like {printable(near['image'])}")
            table.add_row(name, Text(near["pred_class"] or ""), f"{near['similarity']:.3f}")
    console.print(f"by {classifier.how}:")
    console.rich.print(table)
    return 0


def export(job: Export, console: Console) -> int:
    """The weights in another program's layout."""
    subject = EvaluatedNetwork(job.network, console)
    import model

    suffix = {"detectron2": "pkl", "safetensors": "safetensors"}.get(job.to, "pth")
    path = subject.folder / f"{job.to}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    model.export(subject.weights, job.to, path)
    console.print(f"written to {printable(str(path))}")
    return 0


def tune(
    subject: EvaluatedNetwork,
    job: Linear | Semisup,
    name: str,
    train: Store,
    tuning: Tuning,
    batch_size: int,
    amp_dtype: torch.dtype | None = None,
) -> list[nn.Linear]:
    """Trains heads on crops of `train`; what `--resume` goes on from lies in the subject's folder meanwhile."""
    import torch

    import evaluation
    import pipeline

    loader = subject.open_loader(
        train, pipeline.crop_view(subject.size), batch_size, shuffle=True, seed=job.images.seed
    )
    unfinished = subject.folder / f"{name}.unfinished.pt"
    if job.resume and not unfinished.exists():
        raise ValueError(f"{unfinished} is not there: --resume has nothing to go on from")
    subject.folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "images": pipeline.fingerprint(train),
        "weights": subject.digest(),
        "view": subject.size,
    }
    losses: list[float] = []  # of each classifier in the last epoch
    with subject.console.progress(name) as bar:

        def batches(epoch: int) -> Iterator[Batch]:
            loss = f", loss {min(losses):.4g} in the last" if losses else ""
            reading = f"epoch {epoch + 1} of {tuning.epochs}{loss}"
            for step, batch in enumerate(loader.epoch(epoch), epoch * len(loader) + 1):
                yield batch
                bar(step, tuning.epochs * len(loader), reading)

        heads = evaluation.train_heads(
            subject.backbone,
            len(train.classes),
            tuning,
            batches,
            seed=job.images.seed,
            settings=settings | {"batch": batch_size},
            checkpoint=unfinished,
            resume=job.resume,
            progress=lambda done, means: losses.__setitem__(slice(None), means),
            amp_dtype=amp_dtype or torch.float32,
        )
    subject.say_bad(loader, "replaced, since it does not decode:")
    return heads


def keep(
    subject: EvaluatedNetwork, head: nn.Linear, score: dict[str, float], train: Store, name: str
) -> Path:
    """Writes the network and its classifier, for `predict`. FloatingPointError where they have diverged."""
    import model

    if not math.isfinite(score["loss"]):
        raise FloatingPointError(
            "what was trained gives scores that are not finite: lower learning rates may help"
        )
    state = {key: value.detach().cpu() for key, value in head.state_dict().items()}
    # Of the same layout, by which solo-learn's small stem is known, and of the same pretraining
    weights = replace(
        subject.weights,
        backbone=subject.backbone.state_dict(),
        head=state,
        classes=train.classes,
        size=subject.size,
    )
    path = subject.folder / name
    model.export(weights, "safetensors", path)
    return path


def done(subject: EvaluatedNetwork, kept: Path) -> None:
    """Once the results are on the disk, there is nothing to be resumed."""
    kept.with_suffix(".unfinished.pt").unlink(missing_ok=True)
    subject.console.print(
        f"to use it: uv run evaluate.py predict --checkpoint {printable(str(kept))} IMAGE..."
    )


def counts(train: Store) -> dict[str, Any]:
    return {"training images": len(train), "classes": len(train.classes)}


def demo_pictures(console: Console) -> list[Path]:
    """Some test images of the embedded data set, one of each class."""
    folder = find_demo(console)[1]
    assert folder is not None
    return [min(path.iterdir()) for path in sorted(folder.iterdir())][:_SHOWN]


if __name__ == "__main__":
    sys.exit(experiment.run_command(main))
