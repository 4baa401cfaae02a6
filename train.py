"""Pretrain a ResNet with Barlow Twins, and test what it has learned.

uv run train.py                                  generated demo images, on any machine
uv run train.py --data photos                    your own images
uv run train.py imagenet-1000e --data imagenet   a published run
uv run torchrun --nproc-per-node 8 train.py ...  the same on eight GPUs
uv run train.py --help
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import experiment
from evaluation.held_out import HeldOutEvaluation, open_stores
from experiment import Console, Metrics, ThroughputMeter, run_folder
from experiment.checkpoint_schedule import CheckpointSchedule
from experiment.config import Pretrain
from experiment.dry_run import dry_run_table
from experiment.presets import parse
from experiment.training_monitor import Progress, TrainingMonitor

if TYPE_CHECKING:
    import torch

    from model import BarlowTwins, Distributed
    from pipeline import Loader

experiment.set_thread_environment()  # before torch is imported, which is in the functions below


def main(preset: str, config: Pretrain, console: Console) -> int:
    """Check the configuration and the run's folder, then pretrain; return the exit status."""
    run = config.run.run or Path("runs") / preset
    if experiment.is_rank0():
        config.check(ranks=int(os.environ.get("WORLD_SIZE", 1)))
        run_folder.check(run)
    outcome = "two steps, nothing is kept" if config.run.dry_run else f"writes to {run}"
    console.print(f"twinfeed, preset {preset}: {outcome}")
    with ExitStack() as cleanup:
        if config.run.dry_run or not experiment.is_rank0():
            # What these write is thrown away.
            run = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="twinfeed-")))
        cleanup.enter_context(run_folder.preemptible(run))
        return pretrain(preset, config, run, console, cleanup)


def pretrain(  # noqa: C901, PLR0915  # the whole method, in the order in which it happens
    preset: str, config: Pretrain, run: Path, console: Console, cleanup: ExitStack
) -> int:
    """Train from images to exported weights, on every rank; return the exit status.

    `cleanup` closes what is opened here, in reverse order, however the run ends.
    """
    with console.progress_bar("loading torch"):
        import torch

        import model
        import pipeline

    distributed = model.Distributed(os.environ)
    device = pipeline.find_device(config.run.device, distributed.local_rank)
    cleanup.enter_context(distributed.process_group(device))

    # --- Data -------------------------------------------------------------------------------------
    loader, held_out = open_data(preset, config, distributed, device, console)
    steps_per_epoch = len(loader)
    steps = config.optim.epochs * steps_per_epoch

    # --- Network ----------------------------------------------------------------------------------
    model.prepare_device(device, config.run.deterministic)
    # Rank 0 decides for all: ranks that take different steps would wait for each other forever.
    compile_mode, compilation = distributed.from_rank0(
        lambda: model.choose_compilation(config.run.compile, device)
    )
    amp_dtype = distributed.from_rank0(lambda: model.choose_precision(config.run.precision, device))
    network = build_network(config, device, one_pass=compile_mode is not None)
    if config.run.recompute:
        network.backbone.recompute_activations()
    # Compiled, and among several ranks in DistributedDataParallel, with a hook that sums the
    # gradients: each rank computes its part of the gradient of the one global loss. Batch norm and
    # the loss exchange the statistics of the global batch themselves.
    forward = model.compile_and_wrap(device, network, compile_mode)

    devices = name_devices(device, distributed)
    console.print(f"{devices}, {str(amp_dtype).removeprefix('torch.')}, {compilation}")
    console.print(describe_run(config, loader, network))

    # --- Optimizer --------------------------------------------------------------------------------
    optimizer = model.LARS(
        model.parameter_groups(network, config.optim.weight_decay),
        momentum=config.optim.momentum,
        eta=config.optim.eta,
        clip=config.optim.clip_lr,
    )
    # Of the two parameter groups, in their order: weights; biases and batch norm.
    peak_learning_rates = {
        "lr": config.optim.lr * config.optim.batch_size / 256,
        "lr_biases": config.optim.lr_biases * config.optim.batch_size / 256,
    }
    # Linear warm-up, then a cosine; as fractions of the peak.
    learning_rate_factor = partial(
        model.learning_rate_factor,
        steps=steps,
        warmup_steps=round(config.optim.warmup_epochs * steps_per_epoch),
        start=config.optim.warmup_start,
        end=config.optim.lr_end,
    )
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)

    # --- Resume -----------------------------------------------------------------------------------
    settings = {
        **config.settings(),
        "images": len(loader.store),
        "fingerprint": pipeline.fingerprint(loader.store),
        "precision": str(amp_dtype),  # what `auto` is on this device
    }
    checkpoint_schedule = CheckpointSchedule(
        config.run.checkpoint_minutes, config.run.milestone_epochs, steps_per_epoch
    )
    checkpoints = cleanup.enter_context(
        model.Checkpoints(run, config.run.keep_checkpoints, checkpoint_schedule.milestone_steps)
    )
    # None for a new run. ValueError if the settings have changed, unless --accept-changes is given.
    saved = run_folder.restore(run, checkpoints, config.run, settings, console, distributed)
    trained: dict[str, Any] = {"model": network, "optimizer": optimizer, "scaler": scaler}
    model.load_states(trained, saved, checkpoints.path)
    progress = Progress.from_checkpoint(saved)
    if progress.step:
        console.print(f"resumed after step {progress.step:,}")
    cleanup.enter_context(run_folder.claim(run))
    run_folder.describe(
        run,
        config={"preset": preset, **settings},
        environment=experiment.environment([pipeline.describe_device(device)] * distributed.size),
        views=pipeline.view_grid(loader.store, loader.recipe, config.run.seed),
    )

    # --- Loop -------------------------------------------------------------------------------------
    first_step = progress.step
    last_step = 1 if config.run.dry_run else steps - 1
    batches = cleanup.enter_context(closing(loader.steps(first_step, last_step + 1)))
    meter = ThroughputMeter(config.optim.batch_size, progress.throughput)
    metrics = cleanup.enter_context(Metrics(run / "metrics.jsonl", first_step))
    collapse = model.CollapseMonitor(progress.highest_readings)
    monitor = TrainingMonitor(console, metrics, loader, meter, collapse, progress)
    correlation_steps = model.correlation_steps(steps)
    test_steps = (config.run.eval_epochs or 0) * steps_per_epoch

    def checkpoint_state(completed_steps: int) -> dict[str, Any]:
        """Everything that the run needs to continue after so many steps.

        `saver` calls it, within the loop and if the loop fails, but not before the first step.
        """
        if saver.rescuing and not math.isfinite(output.loss.detach()):
            raise FloatingPointError(f"the loss is {float(output.loss.detach())}")
        states = {name: part.state_dict() for name, part in trained.items()}
        return {**monitor.progress(completed_steps).to_checkpoint(), "settings": settings, **states}

    # Saves the last completed step if the loop fails (not among several GPUs, whose queued work may
    # wait for a rank that is gone), and restores batch norm's averages after a skipped step.
    saver = model.StepSaver(
        network,
        checkpoint_state,
        checkpoints if distributed.is_rank0 and not config.run.dry_run else None,
        first_step,
        alone=distributed.size == 1 or device.type == "cpu",
    )
    with (
        console.progress_bar("pretraining") as bar,
        experiment.stop_signals() as stop_status,
        saver,
    ):
        for step, batch in enumerate(meter.timed(batches), first_step):
            factor = learning_rate_factor(step)
            learning_rates = {name: factor * peak for name, peak in peak_learning_rates.items()}
            for group, rate in zip(optimizer.param_groups, learning_rates.values(), strict=True):
                group["lr"] = rate

            view_a, view_b = batch.views  # [B, 3, S, S] each
            optimizer.zero_grad()
            with autocast:
                output = forward(view_a, view_b)  # loss, features [B, F], embeddings [B, D]
            scaler.scale(output.loss).backward()
            # LARS, not the scaler, skips the step if gradients are not finite. `skipped` is read
            # afterwards, on the device, to restore the averages of batch norm.
            with saver.update(lambda: optimizer.skipped):
                scaler.step(optimizer)
                scaler.update()

            # Once in a while: keep a corner of the cross-correlation matrix, for the report.
            if step in correlation_steps:
                model.save_correlation(run / "correlation" / f"{step:08d}.npy", output)

            # Once in a while: test the features by kNN and a linear probe, on rank 0. The other
            # ranks wait when they next need it.
            scores: dict[str, float] = {}
            test_is_due = test_steps > 0 and (step + 1) % test_steps == 0
            if test_is_due and held_out is not None and distributed.is_rank0:
                with meter.paused():
                    scores = held_out.online(network.backbone.eval())
                    network.train()

            # Once in a while: log, on every rank (only the folder of rank 0 is kept). This waits
            # for the device.
            if scores or step % config.run.log_steps == 0 or step == last_step:
                readings = model.readings(output)
                monitor.log(step, readings, learning_rates, optimizer.skipped_steps, scores)
                if monitor.has_diverged():
                    # Skipped steps have changed nothing: this is the state of the step before them.
                    saver.save(wait=True, steps_back=monitor.skipped_in_a_row)
                    raise FloatingPointError(monitor.divergence(step))
            bar(step + 1, last_step + 1, monitor.status())
            monitor.print_bad_images()

            # Once in a while: save a checkpoint. A skipped step is not saved (unless it is the last
            # one), but the next one is.
            stop = distributed.any_rank(bool(stop_status()))
            due = stop or checkpoint_schedule.is_due(step, saver.saved_at)
            if step == last_step or (due and not optimizer.skipped):
                saver.save(wait=stop)
                if stop:
                    console.print(f"interrupted after step {step + 1:,}; use --resume to continue")
                    return run_folder.stopped(run, stop_status(), distributed.is_rank0)

    # --- Dry run ----------------------------------------------------------------------------------
    throughput = meter.total()
    if config.run.dry_run:
        peak = model.peak_memory(device)
        # The difference to the peak of half a batch is the memory of the other images.
        half = [view[: max(2, len(view) // 2)] for view in batch.views]

        def step_on_half_batch() -> None:
            optimizer.zero_grad()
            with autocast:
                loss = forward(*half).loss
            scaler.scale(loss).backward()

        largest = model.largest_batch(device, len(batch.samples), peak, step_on_half_batch)
        largest *= distributed.size
        seconds = steps * config.optim.batch_size / monitor.readings["images_per_s"]
        images, ranks = len(loader.store), distributed.size
        console.table(dry_run_table(peak, largest, seconds, images, devices, ranks))

    # --- Results ----------------------------------------------------------------------------------
    distributed.leave()
    if config.run.dry_run or not distributed.is_rank0:
        return 0
    checkpoints.finish()
    exported = model.export_backbone(network.backbone, run, config.data.size, config.optim.epochs)
    untrained = build_network(config, device)
    summary = {
        "preset": preset,
        "device": devices,
        "decoder": loader.decoder.name,
        "backbone": config.model.backbone,
        "steps": steps,
        **throughput,
        "loss_first": monitor.first_loss,
        "loss_last": monitor.readings.get("loss"),
        **knn_scores(held_out, untrained, network),
        "checkpoint": str(checkpoints.path),
        "export": str(exported),
    }
    experiment.write_json(run / "summary.json", summary)
    console.table(summary)
    return 0


def open_data(
    preset: str, config: Pretrain, distributed: Distributed, device: torch.device, console: Console
) -> tuple[Loader, HeldOutEvaluation | None]:
    """The loader of the training images, and the test on held-out ones (None without labels)."""
    import pipeline

    train_store, test_store = distributed.from_rank0(lambda: open_stores(preset, config, console))
    recipe = pipeline.barlow_twins(
        config.data.size,
        area=config.data.crop_area,
        blur_p=config.data.blur_p,
        blur_sigma=config.data.blur_sigma,
        solarize_p=config.data.solarize_p,
    )
    cores_per_rank = max(1, pipeline.usable_cores() // distributed.local_size)
    options = pipeline.LoaderOptions(
        batch_size=config.optim.batch_size // distributed.size,
        decoder=config.run.decoder,
        hw_decoder_load=config.run.hw_decoder_load,
        threads=config.run.threads or cores_per_rank,
        seed=config.run.seed,
        rank=distributed.rank,
        world_size=distributed.size,
        shuffle_block=config.data.shuffle_block,
        device=device,
    )
    loader = pipeline.open_loader(train_store, recipe, options)
    if test_store is None:
        return loader, None
    test_view = pipeline.center_view(config.data.size)
    test_options = replace(options, batch_size=128, shuffle=False, rank=0, world_size=1)
    open_test_loader = partial(pipeline.open_loader, recipe=test_view, options=test_options)
    return loader, HeldOutEvaluation(train_store, test_store, open_test_loader, console)


def name_devices(device: torch.device, distributed: Distributed) -> str:
    """The device of this rank, and how many there are."""
    import pipeline

    name = pipeline.describe_device(device)
    return name if distributed.size == 1 else f"{distributed.size} x {name}"


def describe_run(config: Pretrain, loader: Loader, network: BarlowTwins) -> str:
    """The decoder, the amount of data, and the network, in two lines."""
    decoder = loader.decoder
    steps = config.optim.epochs * len(loader)
    parameters = sum(p.numel() for p in network.parameters())
    return (
        f"decoder {decoder.name} ({decoder.reason}) with {loader.threads} threads\n"
        f"{len(loader.store):,} images, {steps:,} steps of {config.optim.batch_size}; "
        f"{config.model.backbone} of width {config.model.width} at {config.data.size} px, "
        f"{parameters:,} parameters"
    )


def build_network(config: Pretrain, device: torch.device, one_pass: bool = False) -> BarlowTwins:
    """The network with the random weights that the seed gives, channels-last on the device."""
    import torch

    import model

    torch.manual_seed(config.run.seed)
    network = model.build_network(config.model, one_pass=one_pass)
    return network.to(device).to(memory_format=torch.channels_last)


def knn_scores(
    held_out: HeldOutEvaluation | None, untrained: BarlowTwins, trained: BarlowTwins
) -> dict[str, float | None]:
    """kNN accuracies of the network before and after training, and of plain image features.

    None if there are no held-out images.
    """
    import evaluation

    features = {
        "knn_top1_untrained": untrained.backbone.eval(),
        "knn_top1_pixels": evaluation.pixel_feature,
        "knn_top1_colour": evaluation.colour_feature,
        "knn_top1_trained": trained.backbone.eval(),
    }
    measured = {} if held_out is None else held_out.knn(features)
    return {name: measured.get(name) for name in features}


if __name__ == "__main__":
    sys.exit(experiment.run_command(lambda console: main(*parse(), console)))
