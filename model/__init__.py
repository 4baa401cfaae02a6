"""Views -> loss -> update: the network, the two forms of the Barlow Twins loss, LARS, its schedule, checkpoints."""

from .backbone import BACKBONES, build_backbone
from .barlow_twins import BarlowTwins
from .checkpoint import Checkpoints, configuration_changes, load_checkpoint, save_checkpoint, write_atomically
from .engine import choose_precision, compile_network
from .knn import colour_feature, knn_accuracies, knn_accuracy, pixel_feature
from .lars import LARS, parameter_groups
from .last_step import LastStep
from .layouts import export_backbone
from .loss import LossParts, barlow_loss, normalize
from .schedule import learning_rate_factor

__all__ = [
    "BACKBONES",
    "LARS",
    "BarlowTwins",
    "Checkpoints",
    "LastStep",
    "LossParts",
    "barlow_loss",
    "build_backbone",
    "choose_precision",
    "colour_feature",
    "compile_network",
    "configuration_changes",
    "export_backbone",
    "knn_accuracies",
    "knn_accuracy",
    "learning_rate_factor",
    "load_checkpoint",
    "normalize",
    "parameter_groups",
    "pixel_feature",
    "save_checkpoint",
    "write_atomically",
]
