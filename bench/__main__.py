"""Where does the throughput go? Measures every stage from disk to update on this machine.

python -m bench                      every stage, the bottleneck, other pipelines
python -m bench --data DIR --quick   on your images, in about a minute
torchrun --nproc-per-node 8 -m bench all ranks together, and what contention costs
python -m bench convert              conversions, compared with FFCV's writer
python -m bench step                 the training step alone, compared with the authors'
python -m bench report               tables and plot of the committed results
python -m bench doctor               what is installed, what is missing, and what that costs

`run.py` explains what is measured, and is the file to read next.
"""

from __future__ import annotations

import sys
from importlib import import_module

import experiment
from experiment import Console

# Before torch is imported.
experiment.set_thread_environment()


def main(arguments: list[str], console: Console) -> int:
    """Run the command and return its exit status. Torch is loaded only if it needs torch."""
    command = arguments[0] if arguments else ""
    if command == "doctor":
        from . import doctor

        return doctor.main(arguments[1:], console)
    if command == "report":
        from . import report

        return report.main(arguments[1:])
    if command in ("convert", "step"):
        with console.progress_bar("loading torch"):
            module = import_module(f".{command}", __package__)
        return module.main(arguments[1:], console)

    from . import options

    # Wrong options are reported before torch is loaded, which takes seconds.
    parsed = options.parse(arguments)
    with console.progress_bar("loading torch"):
        from . import run
    return run.main(parsed, console)


if __name__ == "__main__":
    sys.exit(experiment.run_command(lambda console: main(sys.argv[1:], console)))
