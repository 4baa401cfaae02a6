"""Views -> loss -> update: the network, the two forms of the Barlow Twins loss, LARS, its schedule, checkpoints."""

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
from .foreign import read_foreign
from .health import Collapse, correlation_corner, correlation_steps, feature_readings, readings, save_correlation
from .knn import colour_feature, knn_accuracies, knn_accuracy, online_accuracies, pixel_feature, probe_accuracy
from .lars import LARS, parameter_groups
from .last_step import LastStep
from .layouts import EXPORTS, LAYOUTS, Weights, export, export_backbone, load_backbone, read_weights
from .loss import LossParts, barlow_loss, normalize
from .ranks import Ranks
from .schedule import learning_rate_factor

__all__ = [
    "BACKBONES",
    "EXPORTS",
    "LARS",
    "LAYOUTS",
    "BarlowTwins",
    "Checkpoints",
    "Collapse",
    "LastStep",
    "LossParts",
    "Ranks",
    "Twins",
    "Weights",
    "barlow_loss",
    "build_backbone",
    "choose_compilation",
    "choose_precision",
    "colour_feature",
    "configuration_changes",
    "continue_from",
    "correlation_corner",
    "correlation_steps",
    "export",
    "export_backbone",
    "feature_readings",
    "knn_accuracies",
    "knn_accuracy",
    "largest_batch",
    "learning_rate_factor",
    "load_backbone",
    "load_checkpoint",
    "load_states",
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
    "write_atomically",
]
