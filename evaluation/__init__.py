"""Evaluation of pretrained networks: kNN, linear classifiers, fine-tuning, SVMs, prediction.

In another program:

    from twinfeed.evaluation import load_classifier  # in the repository: from evaluation import ...

    classifier = load_classifier("runs/demo", train="photos")
    classifier.predict("cat.jpg")  # {"pred_class": "cat", "pred_label": 3, "pred_score": 0.93}

To read the code, begin with `protocols.py` (the published settings), `command_options.py` (the
options of evaluate.py) and `evaluated_network.py` (what all evaluations start from). The names
below are imported when they are first used, so that a command line can answer before torch is
loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier, load_classifier
    from .classifier_training import (
        ClassifierTraining,
        export_classifier,
        remove_unfinished,
        train_classifiers,
    )
    from .feature_metrics import feature_alignment, feature_uniformity, rankme
    from .features import Batches, colour_feature, extract_features, pixel_feature
    from .knn import knn_accuracies, knn_accuracy, knn_votes, nearest_neighbours
    from .linear_heads import RunOptions, SGDConfig, evaluate_heads, train_heads
    from .linear_probe import online_accuracies, probe_accuracy
    from .svm import LabelledFeatures, SvmResult, average_precision, svm_map

__all__ = [
    "Batches",
    "Classifier",
    "ClassifierTraining",
    "LabelledFeatures",
    "RunOptions",
    "SGDConfig",
    "SvmResult",
    "average_precision",
    "colour_feature",
    "evaluate_heads",
    "export_classifier",
    "extract_features",
    "feature_alignment",
    "feature_uniformity",
    "knn_accuracies",
    "knn_accuracy",
    "knn_votes",
    "load_classifier",
    "nearest_neighbours",
    "online_accuracies",
    "pixel_feature",
    "probe_accuracy",
    "rankme",
    "remove_unfinished",
    "svm_map",
    "train_classifiers",
    "train_heads",
]

_NAMES_OF_MODULE = {
    "classifier": ("Classifier", "load_classifier"),
    "classifier_training": (
        "ClassifierTraining",
        "export_classifier",
        "remove_unfinished",
        "train_classifiers",
    ),
    "feature_metrics": ("feature_alignment", "feature_uniformity", "rankme"),
    "features": ("Batches", "colour_feature", "extract_features", "pixel_feature"),
    "knn": ("knn_accuracies", "knn_accuracy", "knn_votes", "nearest_neighbours"),
    "linear_heads": ("RunOptions", "SGDConfig", "evaluate_heads", "train_heads"),
    "linear_probe": ("online_accuracies", "probe_accuracy"),
    "svm": ("LabelledFeatures", "SvmResult", "average_precision", "svm_map"),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name at its first use; Python calls this for names not defined yet (PEP 562)."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
