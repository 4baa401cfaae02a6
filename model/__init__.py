"""Views -> loss -> update: the network, its loss, LARS, precision and compilation, ranks, and checkpoints."""

from .backbone import BACKBONES, Backbone, build_backbone
from .barlow_twins import BarlowTwins, BarlowTwinsOutput
from .checkpoint import (
    Checkpoints,
    configuration_changes,
    load_checkpoint,
    load_states,
    save_checkpoint,
    write_atomically,
)
from .distributed import Distributed
from .engine import (
    choose_compilation,
    choose_precision,
    compile_and_wrap,
    largest_batch,
    peak_memory,
    prepare_device,
    reset_peak_memory,
)
from .health import (
    CollapseMonitor,
    correlation_corner,
    correlation_steps,
    feature_readings,
    readings,
    save_correlation,
)
from .interop import (
    EXPORTS,
    LAYOUTS,
    Weights,
    continue_from,
    export,
    export_backbone,
    load_backbone,
    read_weights,
    safe_load,
)
from .lars import LARS, parameter_groups
from .loss import LossParts, barlow_loss, normalize
from .schedule import learning_rate_factor
from .step_guard import StepGuard

__all__ = [
    "BACKBONES",
    "Backbone",
    "BarlowTwins",
    "BarlowTwinsOutput",
    "Checkpoints",
    "CollapseMonitor",
    "Distributed",
    "EXPORTS",
    "LARS",
    "LAYOUTS",
    "LossParts",
    "StepGuard",
    "Weights",
    "barlow_loss",
    "build_backbone",
    "choose_compilation",
    "choose_precision",
    "compile_and_wrap",
    "configuration_changes",
    "continue_from",
    "correlation_corner",
    "correlation_steps",
    "export",
    "export_backbone",
    "feature_readings",
    "largest_batch",
    "learning_rate_factor",
    "load_backbone",
    "load_checkpoint",
    "load_states",
    "normalize",
    "parameter_groups",
    "peak_memory",
    "prepare_device",
    "read_weights",
    "readings",
    "reset_peak_memory",
    "safe_load",
    "save_checkpoint",
    "save_correlation",
    "write_atomically",
]
