"""What the features of pretrained weights are good for: kNN, linear classifiers, fine-tuning, SVMs, prediction.

In another program:

    from twinfeed.evaluation import load_classifier      # `from evaluation import ...` in the repository

    classifier = load_classifier("runs/demo", train="photos")
    classifier.predict("cat.jpg")       # {"pred_class": "cat", "pred_label": 3, "pred_score": 0.93}

`protocols.py` has the published settings, `evaluated_network.py` the network that all evaluations start from. The
names below are imported when they are first used, so that a command line can answer before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier, load_classifier
    from .features import (
        Batches,
        colour_feature,
        effective_rank,
        extract,
        feature_alignment,
        feature_uniformity,
        pixel_feature,
    )
    from .knn import (
        knn_accuracies,
        knn_accuracy,
        knn_votes,
        neighbours,
        online_accuracies,
        probe_accuracy,
    )
    from .linear_heads import Tuning, accuracies, train_heads
    from .svm import SvmResult, average_precision, svm_map

_HOMES = {
    "classifier": ("Classifier", "load_classifier"),
    "features": (
        "Batches",
        "colour_feature",
        "effective_rank",
        "extract",
        "feature_alignment",
        "feature_uniformity",
        "pixel_feature",
    ),
    "knn": (
        "knn_accuracies",
        "knn_accuracy",
        "knn_votes",
        "neighbours",
        "online_accuracies",
        "probe_accuracy",
    ),
    "linear_heads": ("Tuning", "accuracies", "train_heads"),
    "svm": ("SvmResult", "average_precision", "svm_map"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Batches",
    "Classifier",
    "SvmResult",
    "Tuning",
    "accuracies",
    "average_precision",
    "colour_feature",
    "effective_rank",
    "extract",
    "feature_alignment",
    "feature_uniformity",
    "knn_accuracies",
    "knn_accuracy",
    "knn_votes",
    "load_classifier",
    "neighbours",
    "online_accuracies",
    "pixel_feature",
    "probe_accuracy",
    "svm_map",
    "train_heads",
]


def __getattr__(name: str) -> Any:
    """Python calls this for a name that the module does not have yet (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
