"""On resume, each rank reads the checkpoint itself; if one cannot, rank 0 sends it to all."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import TINY, Command, at_step, ctrl_c, logged_steps, weights_of
from tests.helpers.torchrun import Torchrun, errors, tracebacks

OPTIONS = [*TINY, "--epochs", "2", "--lr", "6", "--threads", "1", "--log-steps", "1"]  # 10 steps

# Each rank prints a digest of the weights that it starts from, and the size of the largest object
# that rank 0 has sent to it.
PRINT_WEIGHTS_AND_BROADCASTS = """
import hashlib, pickle
import torch.distributed
import model

broadcast = torch.distributed.broadcast_object_list
load_states = model.load_states
largest = 0

def recorded_broadcast(objects, **options):
    global largest
    broadcast(objects, **options)
    largest = max(largest, len(pickle.dumps(objects)))

def recorded_load_states(parts, saved, path):
    others = load_states(parts, saved, path)
    weights = parts["model"].state_dict().values()
    digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()
    print(f"rank {rank}: weights {digest}, received {largest} bytes", flush=True)
    return others

torch.distributed.broadcast_object_list = recorded_broadcast
model.load_states = recorded_load_states
"""

# As on another machine without a shared file system.
NO_CHECKPOINT_ON_RANK_1 = """
import builtins
from experiment import run_folder

def open_without_checkpoints(path, *arguments):
    if str(path).endswith("checkpoint.pt"):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return builtins.open(path, *arguments)

if rank == "1":
    run_folder.open = open_without_checkpoints
"""


def digest_of(weights: dict[str, Any]) -> str:
    data = b"".join(weight.numpy().tobytes() for weight in weights.values())
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "shared",
    [
        pytest.param(True, marks=pytest.mark.slow, id="shared folder"),
        pytest.param(False, id="separate folders"),
    ],
)
def test_ranks_resume_from_the_same_bits_and_weights_are_sent_only_if_one_cannot_read_them(
    torchrun: Torchrun,
    train: Command,
    unlabelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
) -> None:
    run = tmp_path / "run"
    options = ["--data", unlabelled, *OPTIONS, "--run-folder", run]
    at_step(monkeypatch, 3, ctrl_c)
    assert train(*options)[0] == 130
    saved = digest_of(weights_of(run))

    hook = PRINT_WEIGHTS_AND_BROADCASTS
    if not shared:
        hook += NO_CHECKPOINT_ON_RANK_1
    status, text = torchrun(*options, "--resume", hook=hook)
    assert status == 0, text
    assert not errors(text) + tracebacks(text), text
    assert logged_steps(run) == list(range(10))

    # The lines of two ranks may be mixed, so this does not look at where they end.
    ranks = re.findall(r"rank (\d): weights (\w+), received (\d+) bytes", text)
    assert sorted(rank for rank, _, _ in ranks) == ["0", "1"], text
    assert [digest for _, digest, _ in ranks] == [saved, saved]
    weights_bytes = 4 * 180_000
    assert [int(size) > weights_bytes for _, _, size in ranks] == [not shared, not shared]
    assert text.count("cannot be read on every machine") == (0 if shared else 1)
