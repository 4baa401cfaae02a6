"""A run as a thing: its configuration, what it prints, the files in its folder, and the page about it.

Nothing here loads torch when it is imported, so that the command line answers at once.
"""

from .command import explain, is_rank0, run_command, set_thread_environment
from .console import Console, ProgressBar, counted, printable
from .files import finite, write_json
from .metrics import Metrics, ThroughputMeter
from .options import DecoderName, check_option
from .presets import PRESETS, Pretrain
from .provenance import environment
from .signals import INTERRUPTED, PREEMPTED, stop_signals

__all__ = [
    "INTERRUPTED",
    "PREEMPTED",
    "PRESETS",
    "Console",
    "DecoderName",
    "Metrics",
    "Pretrain",
    "ProgressBar",
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
