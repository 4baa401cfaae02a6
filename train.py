"""Pretrain a ResNet with Barlow Twins, and measure what it learned.

uv run train.py                                  the embedded data set, on whatever machine this is
uv run train.py --data photos                    the same on your images
uv run train.py imagenet-1000e --data imagenet   a published run
uv run train.py --help
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from presets import Pretrain, parse
from runlog import Feed, Metrics, RunLog, counted, make_room, reading, stop_signals, write_json

# torch's CPU threads must not spin while they wait: the decoding threads need those cores (bench/NOTES.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:  # torch takes seconds to import: that waits until the command line is understood and answered
    from model import BarlowTwins
    from pipeline import Batch, Loader, Recipe, Store

_KNN_BANK, _KNN_QUERIES = 50_000, 10_000  # images in the final kNN test, at most
INTERRUPTED = 130  # exit status of a run that was stopped and saved


def main(preset: str, config: Pretrain, log: RunLog) -> int:
    """One run from data to exported weights; returns the exit status."""
    config.check()
    run = config.run.run or Path("runs") / preset
    log.say(f"twinfeed, preset {preset}: {'two steps, nothing kept' if config.run.dry_run else f'writes to {run}'}")
    with log.bar("loading torch"):
        import torch

        import model as barlow
        import pipeline

    # ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    device = pipeline.find_device(config.run.device)
    train_store, test_store = open_stores(preset, config, log)
    recipe = pipeline.barlow_twins(
        config.data.size,
        area=config.data.crop_area,
        blur_p=config.data.blur_p,
        blur_sigma=config.data.blur_sigma,
        solarize_p=config.data.solarize_p,
    )

    def open_loader(store: Store, recipe: Recipe, batch_size: int, shuffle: bool) -> Loader:
        return pipeline.open_loader(
            store,
            recipe,
            batch_size=batch_size,
            decoder=config.run.decoder,
            threads=config.run.threads,
            seed=config.run.seed,
            shuffle=shuffle,
            device=device,
        )

    loader = open_loader(train_store, recipe, config.optim.batch_size, shuffle=True)
    steps = config.optim.epochs * len(loader)

    # ── model ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def build_model() -> BarlowTwins:
        torch.manual_seed(config.run.seed)
        backbone = barlow.build_backbone(config.model.backbone, config.model.width, config.model.small_stem)
        network = barlow.BarlowTwins(backbone, config.model.projector, config.model.lambd, config.model.loss_scale)
        return network.to(device).to(memory_format=torch.channels_last)

    torch.backends.cudnn.benchmark = True
    model = build_model()
    amp_dtype = barlow.choose_precision(config.run.precision, device)
    forward, compilation = barlow.compile_network(model, config.run.compile, device)
    device_name = pipeline.describe_device(device)
    log.say(
        f"{device_name}, {str(amp_dtype).removeprefix('torch.')}, {compilation}; decoder {loader.decoder.name} with "
        f"{loader.threads} threads\n{len(train_store):,} images, {steps:,} steps of {config.optim.batch_size}; "
        f"{config.model.backbone} of width {config.model.width} at {config.data.size} px, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
    )

    # ── optimizer ────────────────────────────────────────────────────────────────────────────────────────────────────
    groups = barlow.parameter_groups(model, config.optim.weight_decay)
    optimizer = barlow.LARS(groups, momentum=config.optim.momentum, eta=config.optim.eta, clip=config.optim.clip_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    peaks = [lr * config.optim.batch_size / 256 for lr in (config.optim.lr, config.optim.lr_biases)]
    warmup_steps = round(config.optim.warmup_epochs * len(loader))
    first_lr, last_lr = config.optim.warmup_start, config.optim.lr_end

    # ── resume ───────────────────────────────────────────────────────────────────────────────────────────────────────
    cleanup = ExitStack()
    if config.run.dry_run:
        run, steps = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="twinfeed-"))), 2
    checkpoint = run / "checkpoint.pt"
    settings = config.settings() | {"images": len(train_store), "fingerprint": pipeline.fingerprint(train_store)}
    first_step, loss_first, values = 0, math.nan, {}
    if config.run.resume:
        saved = barlow.load_checkpoint(checkpoint, device)
        if changes := barlow.configuration_changes(saved.get("settings", {}), settings):
            raise ValueError(f"{checkpoint} has another configuration, resume it with its own: " + "; ".join(changes))
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        first_step, loss_first, values = saved["step"], saved["loss_first"], saved["values"]
        log.say(f"resumed after step {first_step:,}")
    elif moved := make_room(run):
        log.say(f"the run that was in {run} is now in {moved}")

    def save(step: int) -> None:
        state = {"step": step, "settings": settings, "loss_first": loss_first, "values": values}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        barlow.save_checkpoint(checkpoint, state)

    # ── loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    write_json(run / "config.json", {"preset": preset, **settings})
    pipeline.view_picture(train_store, recipe, config.run.seed).save(run / "views.png")
    metrics = cleanup.enter_context(Metrics(run / "metrics.jsonl", first_step))
    batches = cleanup.enter_context(closing(loader.steps(first_step, steps)))
    feed, bad_said, saved_at = Feed(batches, config.optim.batch_size), 0, time.monotonic()
    with cleanup, log.bar("pretraining") as bar, stop_signals() as stop_asked:
        for step, ((view_a, view_b), _, _) in enumerate(feed, first_step):  # each [B, 3, S, S]
            factor = barlow.learning_rate_factor(step, steps, warmup_steps, start=first_lr, end=last_lr)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = factor * peak
            optimizer.zero_grad()
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                parts = forward(view_a, view_b)
            scaler.scale(parts.loss).backward()
            scaler.step(optimizer)
            scaler.update()

            if step % config.run.log_steps == 0 or step == steps - 1:
                values = {
                    name: float(value.detach()) for name, value in parts._asdict().items()
                }  # waits for the device
                check_finite(values["loss"], step)
                loss_first = values["loss"] if step == 0 else loss_first
                values |= feed.rates()
                metrics.write(step=step, lr=factor * peaks[0], bad_images=len(loader.bad), **values)
            bar(step + 1, steps, reading(values))
            for sample, reason in list(loader.bad.items())[bad_said:]:
                log.say(f"replaced an image that does not decode: {train_store.name(sample)}: {reason}")
                bad_said += 1

            due = step == steps - 1 or time.monotonic() - saved_at > 60 * config.run.checkpoint_minutes
            if (due or stop_asked()) and not config.run.dry_run:
                check_finite(float(parts.loss.detach()), step)
                save(step + 1)
                saved_at = time.monotonic()
            if stop_asked():
                log.say(f"interrupted after step {step + 1:,}; --resume goes on from there")
                return INTERRUPTED
    rates = feed.total()
    if config.run.dry_run:
        log.say(f"two steps done, loss {values['loss']:.4g}: this configuration runs")
        return 0

    # ── proof and export ─────────────────────────────────────────────────────────────────────────────────────────────
    names = ("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour", "knn_top1_trained")
    scores: dict[str, float | None] = dict.fromkeys(names)
    if test_store is not None:
        untrained, trained = build_model().backbone.eval(), model.backbone.eval()
        features = dict(zip(names, (untrained, barlow.pixel_feature, barlow.colour_feature, trained), strict=True))
        with log.bar("kNN test") as bar:

            def test_views(store: Store, most: int) -> Iterator[Batch]:
                loader = open_loader(pipeline.at_most(most, store), pipeline.center_view(config.data.size), 128, False)
                return counted(loader.epoch(0), len(loader), bar)

            bank, queries = test_views(train_store, _KNN_BANK), test_views(test_store, _KNN_QUERIES)
            scores |= barlow.knn_accuracies(bank, queries, features)
    summary = {
        "preset": preset,
        "device": device_name,
        "decoder": loader.decoder.name,
        "backbone": config.model.backbone,
        "steps": steps,
        **rates,
        "loss_first": loss_first,
        "loss_last": values.get("loss"),
        **scores,
        "checkpoint": str(checkpoint),
        "export": str(barlow.export_backbone(model.backbone, run)),
    }
    write_json(run / "summary.json", summary)
    log.table(summary)
    return 0


def check_finite(loss: float, step: int) -> None:
    """ValueError where training has diverged; called before each save, so that a checkpoint is always a good one."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: try a lower --lr")


def open_stores(preset: str, config: Pretrain, log: RunLog) -> tuple[Store, Store | None]:
    """Images to train on, and labelled ones never trained on for the kNN test (None where there are no labels)."""
    import pipeline

    if config.data.data is not None:
        train_folder, test_folder = pipeline.find_splits(config.data.data)
    elif preset == "demo":
        with log.bar("drawing the demo data set, once") as bar:
            train_folder, test_folder = pipeline.find_splits(pipeline.demo_folder(pipeline.cache_folder(), bar))
    else:
        raise ValueError(f"{preset} needs a folder of images: --data DIR")

    def opened(folder: Path) -> Store:
        with log.bar(f"indexing {folder}") as bar:
            store = pipeline.open_store(folder, bar)
        log.say_rejects(folder, store.rejects)
        return store

    train_store = opened(train_folder)
    if not train_store.classes:
        log.say(f"{train_folder} has no class folders: pretraining needs none, but there will be no kNN test")
        return train_store, None
    if test_folder is not None:
        test_store = opened(test_folder)
        if test_store.classes == train_store.classes:
            return train_store, test_store
        log.say(f"{test_folder} has other class folders than {train_folder}: not used")
    train_part, test_part = pipeline.hold_out(train_store, config.data.hold_out, config.run.seed)
    log.say(f"{len(test_part):,} images are kept out of training for the kNN test (--hold-out)")
    return train_part, test_part


if __name__ == "__main__":
    name, configuration = parse()
    try:
        with RunLog() as run_log:
            status = main(name, configuration, run_log)
    except (ValueError, OSError) as error:  # what a user can get wrong or a disk can do; anything else is our mistake
        if os.environ.get("TWINFEED_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(status)
