"""Evaluate pretrained weights as the paper does, and predict the classes of images.

uv run evaluate.py knn                                                  the demo run and data set
uv run evaluate.py linear --checkpoint resnet50.pth --train imagenet    any weights, your images
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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evaluation  # imports torch when a name of it is first used
import experiment
from evaluation import command_options
from evaluation.classifier import load_classifier as load_classifier  # its former place
from evaluation.command_options import (
    CompareCommand,
    ExportCommand,
    ImagesConfig,
    KnnCommand,
    LinearCommand,
    NetworkConfig,
    PredictCommand,
    SemisupCommand,
    SvmCommand,
)
from evaluation.comparison import compare
from evaluation.datasets import (
    demo_test_images,
    find_devkit,
    labelled_subset,
    open_labelled_splits,
)
from evaluation.evaluated_network import EvaluatedNetwork
from evaluation.printing import print_predictions, print_svms, print_sweep
from evaluation.protocols import KNN_PUBLISHED, SVM_PUBLISHED
from evaluation.results import EvaluationResult, save_result
from experiment import Console, printable

if TYPE_CHECKING:
    from evaluation import LabelledFeatures
    from pipeline import Store

experiment.set_thread_environment()  # before torch is imported

_MOST_PAIRS = 10_000  # images whose two distorted views are compared
_DEMO_DEVKIT_VIEW = 144  # pixels: its images show several demo images of 48 pixels each
_EXPORT_SUFFIXES = {"detectron2": "pkl", "safetensors": "safetensors"}


def main(console: Console) -> int:
    """Run the command of the command line; return the exit status."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("evaluate.py is one process, on one device: start it without torchrun")
    command = command_options.parse()
    command.check()
    match command:
        case KnnCommand():
            knn(command, console)
        case LinearCommand():
            linear(command, console)
        case SemisupCommand():
            semisup(command, console)
        case SvmCommand():
            svm(command, console)
        case PredictCommand():
            predict(command, console)
        case ExportCommand():
            export(command, console)
        case CompareCommand():
            compare(command.runs, console)
    return 0


def knn(command: KnnCommand, console: Console) -> None:
    """Measure kNN accuracy, and what features show without labels."""
    network = open_network(command.network, command.images, console)
    import pipeline

    train, test = open_labelled_splits(command.images, console)
    bank = network.features(train, "features of the bank (training set)")
    queries = network.features(test, "features of the queries (test set)")
    accuracy = evaluation.knn_accuracy(
        bank.values,
        bank.labels,
        queries.values,
        queries.labels,
        command.k,
        command.temperature,
    )
    view_a, view_b = network.features_of_distorted_views(
        pipeline.random_subset(_MOST_PAIRS, test, command.images.seed)
    )
    result = EvaluationResult(
        name="knn",
        figures={
            "knn_top1": accuracy["top1"],
            "knn_top5": accuracy["top5"],
            "effective_rank": evaluation.rankme(bank.values),
            "alignment": evaluation.feature_alignment(view_a, view_b),
            "uniformity": evaluation.feature_uniformity(queries.values),
        },
        setup={**count_images(train), "k": command.k, "temperature": command.temperature},
        published=KNN_PUBLISHED,
        stores={"train": train, "test": test},
    )
    save_result(result, command, network)


def linear(command: LinearCommand, console: Console) -> None:
    """Train linear classifiers on the frozen network; export the best one for `predict`."""
    network = open_network(command.network, command.images, console)
    train, test = open_labelled_splits(command.images, console)
    protocol = command.protocol
    heads = command.heads()
    name = f"linear-{command.preset_name}"
    if len(heads) > 1:
        name += "-sweep"

    sgd = evaluation.SGDConfig(
        protocol.epochs, tuple(heads), milestones=protocol.milestones or None
    )
    training = evaluation.ClassifierTraining(
        name,
        sgd,
        batch_size=command.batch_size,
        seed=command.images.seed,
        resume=command.resume,
        precision=command.precision,
    )
    trained = evaluation.train_classifiers(network, train, training)
    scores = evaluation.evaluate_heads(
        network.backbone, trained, network.views(test, "testing"), training.amp_dtype
    )
    best = index_of_best(scores)
    exported = evaluation.export_classifier(
        network, trained[best], scores[best], train.classes, name
    )

    details = [
        {"lr": lr, "weight decay": decay, **score}
        for (lr, decay), score in zip(heads, scores, strict=True)
    ]
    result = EvaluationResult(
        name=name,
        figures=scores[best],
        setup={
            **count_images(train),
            "batch": command.batch_size,
            "precision": command.precision,
            **protocol.setup,
            "lr": details[best]["lr"],
            "weight decay": details[best]["weight decay"],
            "classifiers tried": len(heads),
        },
        published=command.published(),
        stores={"train": train, "test": test},
        details={"heads": details},
    )
    save_result(result, command, network)
    if len(heads) > 1:
        print_sweep(details, console)
    finish_training(network, name, exported)


def semisup(command: SemisupCommand, console: Console) -> None:
    """Fine-tune the network and a new linear classifier on few labels."""
    network = open_network(command.network, command.images, console)
    train, test = open_labelled_splits(command.images, console)
    labelled = labelled_subset(train, command.labels, command.images.seed)
    fraction = len(labelled) / len(train)
    protocol = command.protocol
    name = f"semisup-{100 * fraction:.3g}percent"

    sgd = evaluation.SGDConfig(
        protocol.epochs,
        heads=((protocol.lr, 0.0),),
        momentum=0.9,
        backbone_lr=protocol.backbone_lr,
        milestones=protocol.milestones or None,
        gamma=0.2,
    )
    training = evaluation.ClassifierTraining(
        name,
        sgd,
        batch_size=protocol.batch_size,
        seed=command.images.seed,
        resume=command.resume,
    )
    (head,) = evaluation.train_classifiers(network, labelled, training)
    (score,) = evaluation.evaluate_heads(network.backbone, [head], network.views(test, "testing"))
    exported = evaluation.export_classifier(network, head, score, train.classes, name)

    result = EvaluationResult(
        name=name,
        figures=score,
        setup={**count_images(train), "labelled images": len(labelled), **protocol.setup},
        published=command.published(fraction),
        stores={"train": train, "labelled": labelled, "test": test},
    )
    save_result(result, command, network)
    finish_training(network, name, exported)


def svm(command: SvmCommand, console: Console) -> None:
    """Train a linear SVM for each class of VOC2007."""
    config = command.network
    if command.voc07 is None and config.size is None:
        config = replace(config, size=_DEMO_DEVKIT_VIEW)
    network = EvaluatedNetwork(config, console, decoder=command.decoder, threads=command.threads)
    import pipeline

    devkit = find_devkit(command.voc07, console)
    trainval, trainval_features, classes = read_voc_split(network, devkit, "trainval")
    test, test_features, _ = read_voc_split(network, devkit, "test")
    jobs = command.threads or pipeline.usable_cores()
    if command.voc07 is None:
        jobs = 1  # to start processes would take longer than the fits on demo images
    with console.progress_bar("support vector machines") as bar:
        svms = evaluation.svm_map(
            trainval_features, test_features, classes, jobs=jobs, progress=bar
        )

    by_class = {
        name: {"average_precision": precision, "C": cost}
        for name, precision, cost in zip(classes, svms.average_precisions, svms.costs, strict=True)
    }
    result = EvaluationResult(
        name="svm",
        figures={"map": svms.mean_average_precision},
        setup={
            "training images": len(trainval),
            "test images": len(test),
            "classes": len(classes),
        },
        published=SVM_PUBLISHED,
        stores={"trainval": trainval, "test": test},
        details={"each": by_class},
    )
    save_result(result, command, network)
    print_svms(svms, classes, console)


def predict(command: PredictCommand, console: Console) -> None:
    """Print the classes and scores of images."""
    if command.json:
        console.quiet = True
        console.rich.stderr = True  # for training images that cannot be read, which are printed
    network = EvaluatedNetwork(command.network, console, writes_results=False)
    for path in command.images:  # before the bank is read, which may take minutes
        if not path.exists() or path.is_dir():
            raise ValueError(f"{path} is not a file: name images to predict")
    classifier = evaluation.Classifier(
        network,
        command.train,
        k=command.k,
        temperature=command.temperature,
        neighbours=command.neighbours,
    )
    images = command.images or demo_test_images(console)
    if command.neighbours:
        predictions = classifier.explain(images)
    else:
        predictions = classifier.predict_batch(images)
    if command.json:
        records = [
            {"image": str(path), **prediction}
            for path, prediction in zip(images, predictions, strict=True)
        ]
        print(json.dumps(records, indent=2))
    else:
        console.print(f"Predicted by {classifier.method}:")
        print_predictions(images, predictions, console)


def export(command: ExportCommand, console: Console) -> None:
    """Write the weights in the layout of another project."""
    network = EvaluatedNetwork(command.network, console)
    import model

    path = network.folder / f"{command.to}.{_EXPORT_SUFFIXES.get(command.to, 'pth')}"
    path.parent.mkdir(parents=True, exist_ok=True)
    model.export(network.weights, command.to, path)
    console.print(f"written to {printable(str(path))}")


# --- Parts of the commands ------------------------------------------------------------------------


def open_network(config: NetworkConfig, images: ImagesConfig, console: Console) -> EvaluatedNetwork:
    return EvaluatedNetwork(config, console, decoder=images.decoder, threads=images.threads)


def count_images(train: Store) -> dict[str, Any]:
    return {"training images": len(train), "classes": len(train.classes)}


def read_voc_split(
    network: EvaluatedNetwork, devkit: Path, split: str
) -> tuple[Store, LabelledFeatures, list[str]]:
    """The images of a VOC2007 split, their features and targets, and the names of the classes."""
    import pipeline

    store, targets, classes = pipeline.open_voc(devkit, split)
    features = network.features(store, f"features of {split}", pipeline.whole_view(network.size))
    readable_targets = targets[features.samples.numpy()]
    return store, evaluation.LabelledFeatures(features.values, readable_targets), classes


def index_of_best(scores: Sequence[dict[str, float]]) -> int:
    """The classifier with the highest top-1 accuracy among those that have not diverged."""
    accuracies = [score["top1"] if math.isfinite(score["loss"]) else -1.0 for score in scores]
    return accuracies.index(max(accuracies))


def finish_training(network: EvaluatedNetwork, name: str, exported: Path) -> None:
    """Remove the checkpoint for `--resume`, now that all results are written."""
    evaluation.remove_unfinished(network, name)
    network.console.print(
        f"to use it: uv run evaluate.py predict --checkpoint {printable(str(exported))} IMAGE..."
    )


if __name__ == "__main__":
    sys.exit(experiment.run_command(main))
