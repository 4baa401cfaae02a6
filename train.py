"""Pretrain a ResNet with Barlow Twins, and measure what it learned.

uv run train.py                                  the embedded data set, on whatever machine this is
uv run train.py --data photos                    the same on your images
uv run train.py imagenet-1000e --data imagenet   a published run
uv run torchrun --nproc-per-node 8 train.py ...  the same on eight GPUs
uv run train.py --help
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import experiment
from evaluation.held_out import HeldOutEvaluation, open_stores
from experiment import Console, run_folder, training_monitor
from experiment.metrics import Metrics, ThroughputMeter
from experiment.presets import Pretrain, parse
from experiment.provenance import environment

experiment.set_thread_environment()

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from model import BarlowTwins, BarlowTwinsOutput, Distributed
    from pipeline import Loader, Recipe, Store


def main(preset: str, config: Pretrain, console: Console) -> int:
    """One run from data to exported weights, on all ranks that torchrun has started; returns the exit status."""
    run = config.run.run or Path("runs") / preset
    if first := experiment.is_rank0():  # of several, one speaks and writes
        config.check(ranks=int(os.environ.get("WORLD_SIZE", 1)))
        run_folder.check(run)
    console.print(
        f"twinfeed, preset {preset}: {'two steps, nothing kept' if config.run.dry_run else f'writes to {run}'}"
    )
    with ExitStack() as cleanup:
        if config.run.dry_run or not first:
            run = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="twinfeed-")))
        cleanup.enter_context(run_folder.preemptible(run))
        with console.progress("loading torch"):
            import model
            import pipeline
        ranks = model.Distributed(os.environ)
        device = pipeline.find_device(config.run.device, ranks.local_rank)
        cleanup.enter_context(ranks.process_group(device))
        return pretrain(preset, config, console, run, ranks, device, cleanup)


def pretrain(
    preset: str,
    config: Pretrain,
    console: Console,
    run: Path,
    ranks: Distributed,
    device: torch.device,
    cleanup: ExitStack,
) -> int:
    import torch

    import evaluation
    import model as model_room
    import pipeline

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    train_store, test_store = ranks.from_rank0(lambda: open_stores(preset, config, console))
    recipe = pipeline.barlow_twins(
        config.data.size,
        area=config.data.crop_area,
        blur_p=config.data.blur_p,
        blur_sigma=config.data.blur_sigma,
        solarize_p=config.data.solarize_p,
    )

    def open_loader(
        store: Store,
        recipe: Recipe,
        batch_size: int,
        shuffle: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> Loader:
        return pipeline.open_loader(
            store,
            recipe,
            pipeline.LoaderOptions(
                batch_size=batch_size,
                decoder=config.run.decoder,
                hw_decoder_load=config.run.hw_decoder_load,
                threads=config.run.threads or max(1, pipeline.usable_cores() // ranks.local_size),
                seed=config.run.seed,
                rank=rank,
                world_size=world,
                shuffle=shuffle,
                shuffle_block=config.data.shuffle_block,
                device=device,
            ),
        )

    batch_size = config.optim.batch_size // ranks.size
    loader = open_loader(train_store, recipe, batch_size, True, ranks.rank, ranks.size)
    steps = config.optim.epochs * len(loader)
    test_view = pipeline.center_view(config.data.size)
    held_out = test_store and HeldOutEvaluation(
        train_store, test_store, lambda store: open_loader(store, test_view, 128), console
    )

    # ── model ────────────────────────────────────────────────────────────────────────────────────────────────────────
    model_room.prepare_device(device, config.run.deterministic)
    # The first rank chooses for all: steps that differ would wait for each other for ever.
    compile_mode, compilation = ranks.from_rank0(
        lambda: model_room.choose_compilation(config.run.compile, device)
    )

    def build_model() -> BarlowTwins:
        torch.manual_seed(config.run.seed)
        backbone = model_room.build_backbone(
            config.model.backbone, config.model.width, config.model.small_stem
        )
        widths, lambd, loss_scale = (
            config.model.projector,
            config.model.lambd,
            config.model.loss_scale,
        )
        network = model_room.BarlowTwins(
            backbone, widths, lambd, loss_scale, one_pass=compile_mode is not None
        )
        return network.to(device).to(memory_format=torch.channels_last)

    model = build_model()
    if config.run.recompute:
        model.backbone.recompute_activations()
    forward = model_room.compile_and_wrap(device, model, compile_mode)
    amp_dtype = ranks.from_rank0(lambda: model_room.choose_precision(config.run.precision, device))
    device_name = f"{ranks.size} x " * (ranks.size > 1) + pipeline.describe_device(device)
    console.print(
        f"{device_name}, {str(amp_dtype).removeprefix('torch.')}, {compilation}; decoder {loader.decoder.name} "
        f"({loader.decoder.why}) with {loader.threads} threads\n{len(train_store):,} images, "
        f"{steps:,} steps of {config.optim.batch_size}; {config.model.backbone} of width {config.model.width} "
        f"at {config.data.size} px, {sum(p.numel() for p in model.parameters()):,} parameters"
    )

    # ── optimizer ────────────────────────────────────────────────────────────────────────────────────────────────────
    groups = model_room.parameter_groups(model, config.optim.weight_decay)
    optimizer = model_room.LARS(
        groups, momentum=config.optim.momentum, eta=config.optim.eta, clip=config.optim.clip_lr
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    peaks = {
        name: getattr(config.optim, name) * config.optim.batch_size / 256
        for name in ("lr", "lr_biases")
    }
    warmup_steps = round(config.optim.warmup_epochs * len(loader))
    first_lr, last_lr = config.optim.warmup_start, config.optim.lr_end

    def learn(view_a: Tensor, view_b: Tensor) -> BarlowTwinsOutput:
        """From views [B, 3, S, S] to gradients."""
        optimizer.zero_grad()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            twins = forward(view_a, view_b)
        scaler.scale(twins.loss).backward()
        return twins

    # ── resume ───────────────────────────────────────────────────────────────────────────────────────────────────────
    settings = config.settings() | {
        "images": len(train_store),
        "fingerprint": pipeline.fingerprint(train_store),
    }
    settings["precision"] = str(amp_dtype)  # what `auto` came to here
    milestone_steps = (config.run.milestone_epochs or 0) * len(loader) or None
    checkpoints = cleanup.enter_context(
        model_room.Checkpoints(run, config.run.keep_checkpoints, milestone_steps)
    )
    learned: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    progress: dict[str, Any] = {
        "step": 0,
        "loss_first": math.nan,
        "values": {},
        "fed": None,
        "highest": None,
    }
    progress |= model_room.load_states(
        learned,
        ranks.from_rank0(lambda: run_folder.saved(run, checkpoints, config.run, settings, console)),
        checkpoints.path,
    )
    if progress["step"]:
        console.print(f"resumed after step {progress['step']:,}")
    first_step, loss_first, values = progress["step"], progress["loss_first"], progress["values"]
    cleanup.enter_context(run_folder.claim(run))

    def state(done: int) -> dict[str, Any]:
        """All that the run goes on from after so many steps."""
        if last.rescuing and not math.isfinite(loss := float(twins.loss.detach())):
            raise FloatingPointError(f"the loss is {loss}")
        progress = {"step": done, "loss_first": loss_first, "values": values, "fed": feed.state()}
        progress |= {"highest": collapse.highest, "settings": settings}
        return progress | {name: part.state_dict() for name, part in learned.items()}

    # ── loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    about = environment([pipeline.describe_device(device)] * ranks.size)
    picture = pipeline.view_grid(train_store, recipe, config.run.seed)
    run_folder.describe(run, {"preset": preset, **settings}, about, picture)
    metrics = cleanup.enter_context(Metrics(run / "metrics.jsonl", first_step))
    last_step = 1 if config.run.dry_run else steps - 1
    batches = cleanup.enter_context(closing(loader.steps(first_step, last_step + 1)))
    feed = ThroughputMeter(batches, config.optim.batch_size, progress["fed"])
    collapse, bad_said = model_room.CollapseMonitor(progress["highest"]), 0
    correlation_steps = model_room.correlation_steps(steps)
    eval_steps = config.run.eval_epochs and config.run.eval_epochs * len(loader)
    keeper = None if config.run.dry_run or not ranks.is_rank0 else checkpoints
    last = model_room.StepGuard(
        model, state, keeper, first_step, alone=ranks.size == 1 or device.type == "cpu"
    )
    with console.progress("pretraining") as bar, experiment.stop_signals() as stop_asked, last:
        for step, ((view_a, view_b), _, _) in enumerate(feed, first_step):
            factor = model_room.learning_rate_factor(
                step, steps, warmup_steps, start=first_lr, end=last_lr
            )
            rates = {name: factor * peak for name, peak in peaks.items()}
            for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                group["lr"] = rate
            twins = learn(view_a, view_b)
            with last.update(lambda: optimizer.skipped):
                scaler.step(optimizer)
                scaler.update()

            if step in correlation_steps:
                model_room.save_correlation(run / "correlation" / f"{step:08d}.npy", twins)
            tested = {}
            if held_out and ranks.is_rank0 and eval_steps and (step + 1) % eval_steps == 0:
                with feed.paused():
                    tested = held_out.online(model.backbone.eval())
                    model.train()
            if tested or step % config.run.log_steps == 0 or step == last_step:
                values = model_room.readings(twins) | feed.rates()  # waits for the device
                loss_first = values["loss"] if math.isnan(loss_first) else loss_first
                skipped, in_a_row = (int(count) for count in optimizer.skipped_steps)
                if warning := collapse.warning(values):
                    console.print(f"step {step:,}: {warning}")
                found = {
                    "skipped": skipped,
                    "bad_images": len(loader.bad),
                    "warning": warning,
                    **tested,
                }
                metrics.write(step=step, epoch=(step + 1) / len(loader), **rates, **values, **found)
                if in_a_row >= training_monitor.SKIPPED_IN_A_ROW:
                    last.save(wait=True, steps_back=in_a_row)
                    raise FloatingPointError(
                        training_monitor.diverged(step, values["loss"], in_a_row)
                    )
            bar(step + 1, last_step + 1, training_monitor.reading(values))
            if len(loader.bad) > bad_said:
                bad = {
                    train_store.name(sample): reason for sample, reason in list(loader.bad.items())
                }
                bad_said = console.print_rejects(
                    "replaced, since it does not decode:", bad, bad_said
                )

            stop = ranks.any_rank(bool(stop_asked()))
            due = time.monotonic() - last.saved_at > 60 * config.run.checkpoint_minutes
            due = due or (milestone_steps is not None and (step + 1) % milestone_steps == 0)
            if step == last_step or ((stop or due) and not optimizer.skipped):
                last.save(wait=stop)
                if stop:
                    console.print(
                        f"interrupted after step {step + 1:,}; --resume goes on from there"
                    )
                    return (
                        run_folder.leave(run, stop_asked() or experiment.PREEMPTED)
                        if ranks.is_rank0
                        else 0
                    )
    rates = feed.total()
    if config.run.dry_run:
        peak = model_room.peak_memory(device)
        half = [view[: max(2, batch_size // 2)] for view in (view_a, view_b)]
        largest = ranks.size * model_room.largest_batch(
            device, batch_size, peak, lambda: learn(*half)
        )
        seconds = steps * config.optim.batch_size / values["images_per_s"]  # since the step before
        console.table(
            training_monitor.outlook(
                peak, largest, len(train_store), seconds, device_name, ranks.size
            )
        )
    ranks.leave()
    if config.run.dry_run or not ranks.is_rank0:
        return 0
    checkpoints.finish()

    # ── proof and export ─────────────────────────────────────────────────────────────────────────────────────────────
    exported = model_room.export_backbone(
        model.backbone, run, config.data.size, config.optim.epochs
    )
    names = ("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour", "knn_top1_trained")
    scores: dict[str, float | None] = dict.fromkeys(names)
    if held_out:
        features = (
            build_model().backbone.eval(),
            evaluation.pixel_feature,
            evaluation.colour_feature,
            model.backbone.eval(),
        )
        scores |= held_out.knn(dict(zip(names, features, strict=True)))
    summary: dict[str, Any] = {
        "preset": preset,
        "device": device_name,
        "decoder": loader.decoder.name,
    }
    summary |= {"backbone": config.model.backbone, "steps": steps, **rates}
    summary |= {"loss_first": loss_first, "loss_last": values.get("loss"), **scores}
    summary |= {"checkpoint": str(checkpoints.path), "export": str(exported)}
    experiment.write_json(run / "summary.json", summary)
    console.table(summary)
    return 0


if __name__ == "__main__":
    sys.exit(experiment.run_command(lambda console: main(*parse(), console)))
