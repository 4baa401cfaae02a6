"""A training run: its configuration, its console output, the files in its folder, and its report.

`config.py` has the options of a run, and `presets.py` the published configurations. `run_folder.py`
manages the folder of a run, `report.py` writes the page about it.

Nothing here imports torch at module level, so that the command line answers at once.
"""

from .atomic_write import finite, write_json
from .config import DataConfig, ModelConfig, OptimConfig, Pretrain, RunConfig
from .console import Console, ProgressBar, counted, printable
from .entry_point import explain, is_rank0, run_command, set_thread_environment
from .metrics import Metrics
from .options import DEFAULT_IN_HELP, DecoderName, check_option
from .presets import PRESETS
from .provenance import environment
from .signals import INTERRUPTED, PREEMPTED, stop_signals
from .throughput import ThroughputMeter

__all__ = [
    "DEFAULT_IN_HELP",
    "INTERRUPTED",
    "PREEMPTED",
    "PRESETS",
    "Console",
    "DataConfig",
    "DecoderName",
    "Metrics",
    "ModelConfig",
    "OptimConfig",
    "Pretrain",
    "ProgressBar",
    "RunConfig",
    "ThroughputMeter",
    "check_option",
    "counted",
    "environment",
    "explain",
    "finite",
    "is_rank0",
    "printable",
    "run_command",
    "set_thread_environment",
    "stop_signals",
    "write_json",
]
