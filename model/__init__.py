"""Views -> loss -> update: the network, its loss, LARS and checkpoints; and what the features are then worth."""

from .backbone import BACKBONES, build_backbone
from .barlow_twins import BarlowTwins, Twins
from .checkpoint import (
    Checkpoints,
    configuration_changes,
    load_checkpoint,
    load_states,
    save_checkpoint,
    write_atomically,
)
from .continuation import continue_from
from .engine import (
    choose_compilation,
    choose_precision,
    largest_batch,
    peak_memory,
    prepare_device,
    reset_peak_memory,
    run_on,
)
from .features import (
    Batches,
    colour_feature,
    effective_rank,
    extract,
    feature_alignment,
    feature_uniformity,
    pixel_feature,
)
from .foreign import read_foreign
from .heads import Tuning, accuracies, train_heads
from .health import Collapse, correlation_corner, correlation_steps, feature_readings, readings, save_correlation
from .knn import knn_accuracies, knn_accuracy, knn_votes, neighbours, online_accuracies, probe_accuracy
from .lars import LARS, parameter_groups
from .last_step import LastStep
from .layouts import EXPORTS, LAYOUTS, Weights, export, export_backbone, load_backbone, read_weights
from .loss import LossParts, barlow_loss, normalize
from .ranks import Ranks
from .schedule import learning_rate_factor
from .svm import SvmResult, average_precision, svm_map

__all__ = [
    "BACKBONES",
    "EXPORTS",
    "LARS",
    "LAYOUTS",
    "BarlowTwins",
    "Batches",
    "Checkpoints",
    "Collapse",
    "LastStep",
    "LossParts",
    "Ranks",
    "SvmResult",
    "Tuning",
    "Twins",
    "Weights",
    "accuracies",
    "average_precision",
    "barlow_loss",
    "build_backbone",
    "choose_compilation",
    "choose_precision",
    "colour_feature",
    "configuration_changes",
    "continue_from",
    "correlation_corner",
    "correlation_steps",
    "effective_rank",
    "export",
    "export_backbone",
    "extract",
    "feature_alignment",
    "feature_readings",
    "feature_uniformity",
    "knn_accuracies",
    "knn_accuracy",
    "knn_votes",
    "largest_batch",
    "learning_rate_factor",
    "load_backbone",
    "load_checkpoint",
    "load_states",
    "neighbours",
    "normalize",
    "online_accuracies",
    "parameter_groups",
    "peak_memory",
    "pixel_feature",
    "prepare_device",
    "probe_accuracy",
    "read_foreign",
    "read_weights",
    "readings",
    "reset_peak_memory",
    "run_on",
    "save_checkpoint",
    "save_correlation",
    "svm_map",
    "train_heads",
    "write_atomically",
]
