"""Where does the throughput go? Measures every rung from disk to update on this machine, and its rivals beside it.

python -m bench                      the ladder on drawn photographs, the verdict, the peers
python -m bench --data DIR --quick   on your images, within a minute
torchrun --nproc-per-node 8 -m bench all ranks together, and what contention costs
python -m bench convert              conversions, FFCV's writer beside ours
python -m bench step                 the training step alone, the authors' beside ours
python -m bench report               tables and plot of the committed results
python -m bench doctor               what is installed, what is missing, and what it would bring
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

import experiment
from experiment import Console

# As train.py does, before torch is loaded.
experiment.set_thread_environment()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["doctor"]:
        from . import doctor

        return doctor.main(arguments[1:])
    if arguments[:1] == ["report"]:
        from . import report

        return report.main(arguments[1:])
    if arguments[:1] in (["convert"], ["step"]):
        with Console() as console:
            with console.progress("loading torch"):
                verb = import_module(f".{arguments[0]}", __package__)
            return verb.main(arguments[1:], console)
    from . import options

    config = options.parse(arguments)
    console = Console()
    console.quiet = os.environ.get("RANK", "0") != "0"  # under torchrun one of them speaks
    with console:
        with console.progress(
            "loading torch"
        ):  # takes seconds: only once the command line is understood
            from . import run
        return run.main(config, console)


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("TWINFEED_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)
