"""From views to weight updates: the network, its loss, the optimizer, and checkpoints.

Start with `BarlowTwins` in barlow_twins.py and the loss in loss.py. Around them:

- backbone.py, batch_norm.py: the ResNets, with batch statistics for each view;
- lars.py, schedule.py: the optimizer and its learning rate;
- engine.py, distributed.py, memory.py: precision, compilation, several ranks, memory use;
- checkpoint.py, step_saver.py: saving, resuming, and what happens to a run that fails;
- collapse.py: readings that show a collapse;
- interop/: weights in the file formats of other projects.
"""

from .atomic_write import write_atomically
from .backbone import BACKBONES, Backbone, build_backbone
from .barlow_twins import BarlowTwins, BarlowTwinsOutput, NetworkConfig, build_network
from .checkpoint import (
    Checkpoints,
    configuration_changes,
    load_checkpoint,
    load_states,
    save_checkpoint,
)
from .collapse import (
    CollapseMonitor,
    correlation_corner,
    correlation_steps,
    feature_readings,
    readings,
    save_correlation,
)
from .distributed import Distributed
from .engine import (
    choose_compilation,
    choose_precision,
    compile_and_wrap,
    prepare_device,
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
from .memory import (
    largest_batch,
    peak_memory,
    peak_resident_bytes,
    reset_peak_memory,
    reset_peak_resident,
    resident_bytes,
)
from .schedule import learning_rate_factor
from .step_saver import StepSaver

__all__ = [
    "BACKBONES",
    "EXPORTS",
    "LARS",
    "LAYOUTS",
    "Backbone",
    "BarlowTwins",
    "BarlowTwinsOutput",
    "Checkpoints",
    "CollapseMonitor",
    "Distributed",
    "LossParts",
    "NetworkConfig",
    "StepSaver",
    "Weights",
    "barlow_loss",
    "build_backbone",
    "build_network",
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
    "peak_resident_bytes",
    "prepare_device",
    "read_weights",
    "readings",
    "reset_peak_memory",
    "reset_peak_resident",
    "resident_bytes",
    "safe_load",
    "save_checkpoint",
    "save_correlation",
    "write_atomically",
]
