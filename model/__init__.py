"""Views -> loss -> update: the network, the two forms of the Barlow Twins loss, LARS, its schedule, checkpoints."""

from .backbone import BACKBONES, build_backbone
from .barlow_twins import BarlowTwins, Twins
from .checkpoint import LastStep, configuration_changes, load_checkpoint, save_checkpoint, write_atomically
from .engine import COMPILE_MODES, choose_compilation, choose_precision, prepare_device, run_on
from .knn import colour_feature, knn_accuracies, knn_accuracy, pixel_feature
from .lars import LARS, parameter_groups
from .layouts import export_backbone
from .loss import LossParts, barlow_loss, normalize
from .ranks import Ranks
from .schedule import learning_rate_factor

__all__ = [
    "BACKBONES",
    "COMPILE_MODES",
    "LARS",
    "BarlowTwins",
    "LastStep",
    "LossParts",
    "Ranks",
    "Twins",
    "barlow_loss",
    "build_backbone",
    "choose_compilation",
    "choose_precision",
    "colour_feature",
    "configuration_changes",
    "export_backbone",
    "knn_accuracies",
    "knn_accuracy",
    "learning_rate_factor",
    "load_checkpoint",
    "normalize",
    "parameter_groups",
    "pixel_feature",
    "prepare_device",
    "run_on",
    "save_checkpoint",
    "write_atomically",
]
