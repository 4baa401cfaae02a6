"""Faults that end a run from outside of its arithmetic: one clear error, the last step saved, no hang, nothing left."""

from __future__ import annotations

import copy
import errno
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model
import pipeline
from pipeline import FolderStore, LoaderOptions, barlow_twins, distort_cpu, open_loader, open_store
from pipeline.decoders import cpu as decoder_module
from pipeline.machine import single_threaded_workers
from pipeline.stores import folder as folder_module
from tests.helpers.images import write_photos
from tests.helpers.runs import (
    TINY,
    TRAIN,
    Command,
    assert_refused,
    at_step,
    ctrl_c,
    logged_steps,
    same_weights,
)

OPTIONS = [
    *TINY,
    "--epochs",
    "4",
    "--log-steps",
    "3",
    "--lr",
    "6",
    "--threads",
    "2",
]  # 20 steps, one checkpoint
AT = 7  # the step in which most faults come


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("a test of faults hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The same images each time, for a test to do with as it likes."""
    return write_photos(tmp_path / "photos", 40, classes=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("whole")
    command = [
        sys.executable,
        str(TRAIN),
        "--data",
        str(write_photos(folder / "photos", 40, classes=1)),
        *OPTIONS,
    ]
    subprocess.run([*command, "--run", str(folder / "run")], check=True, stdout=subprocess.DEVNULL)
    return folder / "run"


def saved_step(run: Path) -> int:
    return torch.load(run / "checkpoint.pt", weights_only=True)["step"]


# ── what comes from outside of the update costs the step it came in, and no more ─────────────────────────────────────


def anew(error: BaseException) -> BaseException:
    """The same error without the notes that another test's copy may have left: copies share them."""
    copied = copy.copy(error)
    vars(copied).pop("__notes__", None)
    return copied


def once(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    error: BaseException,
    after: bool,
) -> None:
    """That call of a function raises, before or after it has done its work."""
    function, calls = getattr(owner, name), []

    def failing(*rest: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == call and not after:
            raise anew(error)
        result = function(*rest, **named)
        if len(calls) == call:
            raise anew(error)
        return result

    monkeypatch.setattr(owner, name, failing)


class Forgetful(queue.Queue[Any]):
    """Takes so many items, and then nothing, an error neither: as if the thread that puts them were gone."""

    taken = 0

    def put(self, *rest: Any, **named: Any) -> None:
        if self.taken == AT:
            raise MemoryError
        super().put(*rest, **named)
        self.taken += 1


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore about it")
BUG = RuntimeError("what nobody thought of")
HOST = RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
)
DECODE, FUSED = (
    (decoder_module, "crop_and_resize"),
    (distort_cpu, "distort_view"),
)  # called in their threads
FORWARD, BACKWARD, SCHEDULE = (
    (model.BarlowTwins, "forward"),
    (torch.Tensor, "backward"),
    (model, "learning_rate_factor"),
)
FINISH = (pipeline.Loader, "_finish")
FAULTS: dict[
    str, tuple[Any, ...]
] = {  # function, its call that fails, with what, the words of the error
    "decoding": (
        *DECODE,
        16 * AT,
        BUG,
        ("RuntimeError: what nobody thought of", "TWINFEED_TRACEBACK=1"),
    ),
    "decoding, out of memory": (*DECODE, 16 * AT, MemoryError(), ("out of memory", "--batch-size")),
    "decoding, an exit": (
        *DECODE,
        16 * AT,
        SystemExit(0),
        ("a thread of the loader ended with SystemExit(0)",),
    ),
    "distorting": (*FUSED, 2 * AT, BUG, ("RuntimeError: what nobody thought of",)),
    "the loader's device memory": (*FINISH, AT, NO_MEMORY, ("out of memory", "--batch-size")),
    "forward": (*FORWARD, AT, NO_MEMORY, ("out of memory", "2.00 GiB", "smaller --batch-size")),
    "forward, on the host": (
        *FORWARD,
        AT,
        HOST,
        ("out of memory", "4 bytes", "smaller --batch-size"),
    ),
    "backward": (*BACKWARD, AT, NO_MEMORY, ("out of memory", "2.00 GiB", "smaller --batch-size")),
    "before forward": (
        *SCHEDULE,
        AT,
        KeyError("a bug"),
        ("KeyError: 'a bug'", "TWINFEED_TRACEBACK=1"),
    ),
}


def interrupted(result: tuple[int, str], run: Path, *words: str) -> int:
    """One clear error, which names the last completed step, and that step saved: the step."""
    assert_refused(result, *words, "--resume", str(run / "checkpoint.pt"))
    (step,) = re.findall(r"ended after step (\d+), which is saved in", result[1])
    assert saved_step(run) == int(step)
    return int(step)


def assert_the_rest_is_as_ever(train: Command, photos: Path, run: Path, whole: Path) -> None:
    status, text = train("--data", photos, *OPTIONS, "--run", run, "--resume")
    assert status == 0, text
    assert same_weights(run, whole)
    assert logged_steps(run) == logged_steps(whole)


@pytest.mark.parametrize("kind", list(FAULTS))
def test_a_fault_saves_the_last_step_and_the_resumed_run_ends_to_the_same_bits(
    train: Command,
    photos: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    owner, name, call, error, words = FAULTS[kind]
    run, threads, files = tmp_path / "run", set(threading.enumerate()), os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(
            pipeline, "view_grid", lambda *_: None
        )  # that it is drawn with the same functions is no matter
        once(patch, owner, name, call, error, after=owner is model.BarlowTwins)
        result = train("--data", photos, *OPTIONS, "--run", run)
    step = interrupted(result, run, *words)
    assert step == AT - 1 or (owner in (DECODE[0], FUSED[0]) and AT - 4 <= step < AT), (
        "threads are at work on later ones"
    )
    assert set(threading.enumerate()) == threads
    assert os.listdir("/proc/self/fd") == files
    assert_the_rest_is_as_ever(train, photos, run, whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loader_whose_thread_is_gone_without_a_word_does_not_hang(
    train: Command, photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "view_grid", lambda *_: None)
        patch.setattr(queue, "Queue", Forgetful)
        result = train("--data", photos, *OPTIONS, "--run", tmp_path / "run")
    assert interrupted(result, tmp_path / "run", "the thread that makes the batches is gone") == AT
    assert_the_rest_is_as_ever(train, photos, tmp_path / "run", whole)


def test_data_that_vanish_are_named_and_can_be_brought_back(
    train: Command, photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    at_step(monkeypatch, AT, lambda: photos.rename(elsewhere))
    result = train("--data", photos, *OPTIONS, "--run", run)
    assert (
        AT
        < interrupted(result, run, f"the images in {photos} are out of reach", "No such file")
        <= AT + 6
    )
    assert "replaced" not in result[1], "the images are not bad"
    before = (run / "checkpoint.pt").read_bytes()
    assert_refused(
        train("--data", photos, *OPTIONS, "--run", run, "--resume"), str(photos), "not there"
    )
    assert (run / "checkpoint.pt").read_bytes() == before
    elsewhere.rename(photos)
    assert_the_rest_is_as_ever(train, photos, run, whole)


def test_a_real_process_whose_data_vanish_ends_with_one_line(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        str(TRAIN),
        "--data",
        str(photos),
        *OPTIONS,
        "--epochs",
        "4000",
        "--run",
        str(run),
    ]
    command += ["--checkpoint-minutes", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            while process.poll() is None and not (run / "checkpoint.pt").exists():
                time.sleep(0.01)
            photos.rename(tmp_path / "elsewhere")
            assert process.wait(timeout=20) == 1
            (line,) = process.stderr.read().splitlines()
        finally:
            process.kill()
    assert line.startswith(
        f"error: the images in {photos} are out of reach: No such file or directory. "
    )
    assert line.endswith(
        f"step {saved_step(run)}, which is saved in {run}/checkpoint.pt: continue with --resume"
    )


def test_a_second_fault_costs_no_more_than_the_first(
    train: Command, photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for call, resume, step in ((4, [], 3), (1, ["--resume"], 3), (2, ["--resume"], 4)):
        with monkeypatch.context() as patch:
            once(patch, *FORWARD, call, NO_MEMORY, after=True)
            assert (
                interrupted(train("--data", photos, *OPTIONS, "--run", run, *resume), run) == step
            )
    assert_the_rest_is_as_ever(train, photos, run, whole)


# ── where the last step cannot be saved, the checkpoint before it stays ──────────────────────────────────────────────


def half_a_step(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """That update fails once it has changed some of the weights."""
    rates, calls = model.lars._layer_rates, []

    def failing(params: Any, grads: Any, *rest: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            params[0].data.add_(1)
            raise anew(NO_MEMORY)
        return rates(params, grads, *rest)

    monkeypatch.setattr(model.lars, "_layer_rates", failing)


@pytest.mark.parametrize("minutes", ["0", "60"])
def test_a_fault_in_the_middle_of_the_update_leaves_the_checkpoint_before(
    train: Command,
    photos: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: str,
) -> None:
    run, options = tmp_path / "run", ("--data", photos, *OPTIONS, "--run", tmp_path / "run")
    with monkeypatch.context() as patch:
        at_step(patch, 2, ctrl_c)
        assert train(*options)[0] == 130
    with monkeypatch.context() as patch:
        half_a_step(patch, 5)
        result = train(*options, "--checkpoint-minutes", minutes, "--resume")
    kept = 7 if minutes == "0" else 3
    assert_refused(
        result,
        "after step 7, in the middle of the next update",
        f"step {kept} is saved",
        "--resume",
    )
    assert saved_step(run) == kept
    assert_the_rest_is_as_ever(train, photos, run, whole)


def test_what_has_saved_nothing_says_so(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, *FORWARD, 1, NO_MEMORY, after=True)
    result = train("--data", photos, *OPTIONS, "--run", tmp_path / "run")
    assert_refused(result, "smaller --batch-size", "after step 0: nothing is saved")
    assert "--resume" not in result[1]
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_dry_run_that_runs_out_of_memory_leaves_nothing_and_promises_nothing(
    train: Command, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, *FORWARD, 2, NO_MEMORY, after=True)
    result = train("--data", photos, *OPTIONS, "--dry-run")
    assert_refused(result, "smaller --batch-size")
    assert "saved" not in result[1]
    assert list(Path.cwd().iterdir()) == []


def test_a_device_that_is_lost_keeps_the_step_from_being_saved(tmp_path: Path) -> None:
    def lost(step: int) -> dict[str, Any]:
        raise RuntimeError(
            "CUDA error: an illegal memory access was encountered\nand much more about it"
        )

    def loop(checkpoints: model.Checkpoints) -> None:
        checkpoints.save({"step": 3})
        with model.StepGuard(torch.nn.BatchNorm1d(2), lost, checkpoints, 3) as last:
            with last.update(lambda: torch.tensor(0.0)):
                pass
            raise KeyError

    with model.Checkpoints(tmp_path) as checkpoints, pytest.raises(KeyError) as caught:
        loop(checkpoints)
    assert caught.value.__notes__ == [
        "it ended after step 4, which cannot be saved (CUDA error: an illegal memory access was encountered): "
        f"step 3 is saved in {tmp_path}/checkpoint.pt: continue with --resume"
    ]


def test_a_run_that_diverges_is_not_told_to_go_on(
    train: Command, photos: Path, tmp_path: Path
) -> None:
    options = (
        "--lr",
        "1e30",
        "--lr-biases",
        "1e30",
        "--warmup-epochs",
        "0",
        "--checkpoint-minutes",
        "0",
    )
    result = train("--data", photos, *OPTIONS, *options, "--run", tmp_path / "run")
    assert_refused(result, "the loss is", "lower --lr")
    assert "--resume" not in result[1]


def test_weights_of_a_loss_that_is_no_number_are_not_saved(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = (
        tmp_path / "run",
        ("--lr", "1e30", "--lr-biases", "1e30", "--log-steps", "100", "--warmup-epochs", "0"),
    )
    once(monkeypatch, *BACKWARD, 5, NO_MEMORY, after=False)
    assert_refused(
        train("--data", photos, *OPTIONS, *options, "--run", run),
        "after step 4",
        "nan",
        "nothing is saved",
    )
    assert not (run / "checkpoint.pt").exists()


@contextmanager
def no_room(size: int) -> Iterator[Callable[[], None]]:
    """Call it for a full disk: from then on no file grows beyond `size`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("log_steps", ["1", "100"], ids=["in the metrics", "in the checkpoint"])
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_steps: str
) -> None:
    run = tmp_path / "run"
    options = (
        "--data",
        photos,
        *OPTIONS,
        "--run",
        run,
        "--log-steps",
        log_steps,
        "--checkpoint-minutes",
        "0",
    )
    with no_room(1000) as fill:
        at_step(monkeypatch, AT, fill)
        result = train(*options)
    kept = saved_step(run)
    assert kept in (AT - 1, AT), "it may still be being written when the disk is full"
    assert_refused(
        result, "too large", ", which cannot be saved", f"step {kept} is saved", "--resume"
    )
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]
    status, text = train(*options, "--resume")
    assert status == 0, text
    assert logged_steps(run) == (list(range(20)) if log_steps == "1" else [0, 19])


# ── mistakes of ours ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_traceback_of_a_mistake_is_there_for_the_asking(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(pipeline, "view_grid", lambda *_: None)
    once(monkeypatch, *DECODE, 16 * AT, BUG, after=False)
    monkeypatch.setenv("TWINFEED_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="what nobody thought of") as caught:
        train("--data", photos, *OPTIONS, "--run", run)
    assert "_some" in [entry.name for entry in caught.traceback], (
        "down to the thread that it came from"
    )
    assert caught.value.__notes__[-1].endswith("continue with --resume")
    assert saved_step(run) > 0


def test_a_mistake_outside_the_loop_is_one_line_too(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, model, "export_backbone", 1, BUG, after=False)
    result = train("--data", photos, *OPTIONS, "--run", tmp_path / "run", "--epochs", "1")
    assert_refused(result, "RuntimeError: what nobody thought of", "TWINFEED_TRACEBACK=1")


def test_images_that_turn_bad_while_others_are_reported_are_no_fault(
    train: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the loader's thread finds one while the loop puts the names of the others together."""
    for path in sorted(photos.rglob("*.jpg"))[:3]:
        path.write_bytes(path.read_bytes()[:-300])
    loaders, name, open_loader = [], FolderStore.name, pipeline.open_loader

    def opened(*rest: Any, **named: Any) -> pipeline.Loader:
        loaders.append(open_loader(*rest, **named))
        return loaders[-1]

    def slow_name(store: FolderStore, sample: int) -> str:
        if len(loaders[0].bad) < 6:
            loaders[0].bad[39 - len(loaders[0].bad)] = "found just now"
        return name(store, sample)

    monkeypatch.setattr(pipeline, "open_loader", opened)
    monkeypatch.setattr(FolderStore, "name", slow_name)
    status, text = train("--data", photos, *OPTIONS, "--run", tmp_path / "run", "--epochs", "2")
    assert status == 0, text
    assert text.count("replaced, since it does not decode") == len(loaders[0].bad) >= 6


# ── stores and loaders ───────────────────────────────────────────────────────────────────────────────────────────────


def large(root: Path, images: int = 100_000) -> FolderStore:
    """A folder as it was indexed, and of which nothing is left but an empty class folder."""
    store = FolderStore.__new__(FolderStore)
    store.root, store.classes, store.rejects = root, ["class"], {}
    store.paths = [f"class/{i}.jpg" for i in range(images)]
    store.index = np.zeros(images, dtype=[("label", "i4"), ("height", "i4"), ("width", "i4")])
    store.index["height"] = store.index["width"] = 64
    (root / "class").mkdir(parents=True)
    (root / "other").mkdir()
    return store


def first_batch(store: FolderStore, batch_size: int, **options: Any) -> Any:
    return next(
        open_loader(
            store, barlow_twins(16), LoaderOptions(batch_size=batch_size, threads=2, **options)
        ).epoch(0)
    )


@pytest.mark.parametrize("batch_size", [8, 256, 4096])
def test_that_all_images_are_deleted_is_found_out_soon(tmp_path: Path, batch_size: int) -> None:
    began = time.monotonic()
    with pytest.raises(
        ValueError,
        match=r"\d+ images in a row are bad: \d+ of 100000 .* the first: .*/class/\d+.jpg: ",
    ):
        first_batch(large(tmp_path / "photos"), batch_size)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("gone", ["photos", "photos/class", "."])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("decoder", pipeline.FOR_ANY_STORE)
def test_a_folder_that_is_gone_is_named_at_once(
    tmp_path: Path, gone: str, shuffle: bool, decoder: str
) -> None:
    store, threads = large(tmp_path / "data" / "photos"), set(threading.enumerate())
    (tmp_path / "data" / gone).rename(tmp_path / "away")
    named = tmp_path / "data" / "photos" / ("class" if gone == "photos/class" else "")
    with pytest.raises(
        OSError, match=rf"the images in {named} are out of reach: No such file"
    ) as caught:
        first_batch(store, 64, decoder=decoder, shuffle=shuffle)
    assert not isinstance(caught.value, FileNotFoundError), (
        "which would print a number, and no remedy"
    )
    assert set(threading.enumerate()) == threads


def test_an_empty_mount_point_is_a_disk_that_is_gone(tmp_path: Path) -> None:
    store = large(tmp_path / "photos")
    for folder in ("class", "other"):
        (tmp_path / "photos" / folder).rmdir()
    with pytest.raises(OSError, match=r"photos are out of reach: it is empty"):
        first_batch(store, 64)


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EIO, errno.ENOTCONN, errno.ESTALE], ids=errno.errorcode.get
)
@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_folder_that_cannot_be_listed_is_out_of_reach_and_a_file_alone_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, whole_folder: bool
) -> None:
    store = open_store(write_photos(tmp_path / "photos", 3))

    def failing(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_module, "open", failing, raising=False)
    if not whole_folder:
        assert store.read_batch(np.array([1])) == [b""]
        return
    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(
        OSError,
        match=f"the images in {tmp_path / 'photos'} are out of reach: {os.strerror(number)}",
    ):
        store.read_batch(np.array([1]))


def test_a_process_out_of_files_does_not_blame_an_image(tmp_path: Path) -> None:
    store = open_store(write_photos(tmp_path / "photos", 3))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as free:
        next_file = free.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^\[Errno 24\] Too many open files"):
            store.read_batch(np.array([1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_many_bad_images_are_replaced_as_long_as_there_are_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine in ten: more than the limit, but with a good one here and there."""
    monkeypatch.setattr(pipeline.loader, "_BAD_IN_A_ROW", 40)
    store = open_store(write_photos(tmp_path / "photos", 400))
    for sample in range(400):
        if sample % 10:
            Path(store.name(sample)).write_bytes(b"\xff\xd8 overwritten")
    loader = open_loader(store, barlow_twins(16), LoaderOptions(batch_size=8, threads=2))
    assert all(sample % 10 == 0 for sample in next(loader.epoch(0)).samples.tolist())
    assert len(loader.bad) > 40


def test_a_machine_that_allows_no_more_threads_is_an_error_and_no_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, usual = set(threading.enumerate()), torch.get_num_threads()
    once(
        monkeypatch,
        threading.Thread,
        "start",
        3,
        RuntimeError("can't start new thread"),
        after=False,
    )
    with pytest.raises(RuntimeError, match="can't start new thread"):
        single_threaded_workers(4, "test")
    monkeypatch.undo()
    assert set(threading.enumerate()) == threads
    assert torch.get_num_threads() == usual
    single_threaded_workers(4, "test").shutdown()
