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

import runlog
from presets import Pretrain, parse
from runlog import RunLog

# torch's CPU threads must not spin while they wait: the decoding threads need those cores. And views lie in huge pages:
os.environ |= {"OMP_WAIT_POLICY": "passive", "THP_MEM_ALLOC_ENABLE": "1"} | os.environ  # both measured, bench/NOTES.md

if TYPE_CHECKING:  # torch takes seconds to import: that waits until the command line is understood and answered
    from model import BarlowTwins
    from pipeline import Batch, Loader, Recipe, Store

_KNN_BANK, _KNN_QUERIES = 50_000, 10_000  # images in the final kNN test, at most
INTERRUPTED = 130  # exit status of a run that was stopped and saved


def main(preset: str, config: Pretrain, log: RunLog) -> int:
    """One run from data to exported weights; returns the exit status."""
    config.check()
    run = config.run.run or Path("runs") / preset
    runlog.check_run_folder(run)
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
            hw_decoder_load=config.run.hw_decoder_load,
            threads=config.run.threads,
            seed=config.run.seed,
            shuffle=shuffle,
            shuffle_block=config.data.shuffle_block,
            device=device,
        )

    loader = open_loader(train_store, recipe, config.optim.batch_size, shuffle=True)
    steps = config.optim.epochs * len(loader)

    # ── model ────────────────────────────────────────────────────────────────────────────────────────────────────────
    def build_model() -> BarlowTwins:
        torch.manual_seed(config.run.seed)
        backbone = barlow.build_backbone(config.model.backbone, config.model.width, config.model.small_stem)
        network = barlow.BarlowTwins(
            backbone,
            config.model.projector,
            config.model.lambd,
            config.model.loss_scale,
            one_pass=compile_mode is not None,
        )
        return network.to(device).to(memory_format=torch.channels_last)

    barlow.prepare_device(device, deterministic=False)
    compile_mode, compilation = barlow.choose_compilation(config.run.compile, device)
    model = build_model()
    amp_dtype = barlow.choose_precision(config.run.precision, device)
    forward = barlow.run_on(device, model, compile_mode)
    device_name = pipeline.describe_device(device)
    log.say(
        f"{device_name}, {str(amp_dtype).removeprefix('torch.')}, {compilation}; decoder {loader.decoder.name} "
        f"({loader.decoder.why}) with {loader.threads} threads\n{len(train_store):,} images, "
        f"{steps:,} steps of {config.optim.batch_size}; {config.model.backbone} of width {config.model.width} "
        f"at {config.data.size} px, {sum(p.numel() for p in model.parameters()):,} parameters"
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
    settings["precision"] = str(amp_dtype)  # what `auto` came to here
    first_step, loss_first, values, fed = 0, math.nan, {}, None
    if config.run.resume:
        saved = barlow.load_checkpoint(checkpoint, device)
        if changes := barlow.configuration_changes(saved.get("settings", {}), settings):
            raise ValueError(f"{checkpoint} has another configuration, resume it with its own: " + "; ".join(changes))
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        first_step, loss_first, values, fed = (saved[name] for name in ("step", "loss_first", "values", "fed"))
        log.say(f"resumed after step {first_step:,}")
    elif moved := runlog.make_room(run):
        log.say(f"the run that was in {run} is now in {moved}")
    cleanup.enter_context(runlog.claim(run))

    def write(step: int) -> None:
        runlog.check_finite(float(twins.loss.detach()), step - 1)
        state = {"step": step, "settings": settings, "loss_first": loss_first, "values": values, "fed": feed.state()}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        barlow.save_checkpoint(checkpoint, state)

    # ── loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    runlog.write_json(run / "config.json", {"preset": preset, **settings})
    if picture := pipeline.view_picture(train_store, recipe, config.run.seed):
        picture.save(run / "views.png")
    metrics = cleanup.enter_context(runlog.Metrics(run / "metrics.jsonl", first_step))
    batches = cleanup.enter_context(closing(loader.steps(first_step, steps)))
    feed, bad_said = runlog.Feed(batches, config.optim.batch_size, fed), 0
    last = barlow.LastStep(model, write, None if config.run.dry_run else checkpoint, first_step)
    with cleanup, log.bar("pretraining") as bar, runlog.stop_signals() as stop_asked, last:
        for step, ((view_a, view_b), _, _) in enumerate(feed, first_step):  # each [B, 3, S, S]
            factor = barlow.learning_rate_factor(step, steps, warmup_steps, start=first_lr, end=last_lr)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = factor * peak
            optimizer.zero_grad()
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
                twins = forward(view_a, view_b)
            scaler.scale(twins.loss).backward()
            with last.update():
                scaler.step(optimizer)
                scaler.update()

            if step % config.run.log_steps == 0 or step == steps - 1:
                values = {name: float(value.detach()) for name, value in twins.parts._asdict().items()}
                runlog.check_finite(values["loss"], step)
                loss_first = values["loss"] if step == 0 else loss_first
                values |= feed.rates()
                metrics.write(step=step, lr=factor * peaks[0], bad_images=len(loader.bad), **values)
            bar(step + 1, steps, runlog.reading(values))
            if len(loader.bad) > bad_said:
                bad = {train_store.name(sample): reason for sample, reason in list(loader.bad.items())}
                bad_said = log.say_rejects("replaced, since it does not decode:", bad, bad_said)

            stop = stop_asked()
            if stop or step == steps - 1 or time.monotonic() - last.saved_at > 60 * config.run.checkpoint_minutes:
                last.save()
            if stop:
                log.say(f"interrupted after step {step + 1:,}; --resume goes on from there")
                return INTERRUPTED
    rates = feed.total()
    if config.run.dry_run:
        log.say(f"two steps done, loss {values['loss']:.4g}: this configuration runs")
        return 0

    # ── proof and export ─────────────────────────────────────────────────────────────────────────────────────────────
    exported = barlow.export_backbone(model.backbone, run)
    names = ("knn_top1_untrained", "knn_top1_pixels", "knn_top1_colour", "knn_top1_trained")
    scores: dict[str, float | None] = dict.fromkeys(names)
    if test_store is not None:
        features = (build_model().backbone.eval(), barlow.pixel_feature, barlow.colour_feature, model.backbone.eval())
        with log.bar("kNN test") as bar:

            def test_views(store: Store, most: int) -> Iterator[Batch]:
                loader = open_loader(pipeline.at_most(most, store), pipeline.center_view(config.data.size), 128, False)
                yield from runlog.counted(loader.epoch(0), len(loader), bar)
                log.say_rejects("left out", {store.name(sample): reason for sample, reason in loader.bad.items()})

            bank, queries = test_views(train_store, _KNN_BANK), test_views(test_store, _KNN_QUERIES)
            scores |= barlow.knn_accuracies(bank, queries, dict(zip(names, features, strict=True)))
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
        "export": str(exported),
    }
    runlog.write_json(run / "summary.json", summary)
    log.table(summary)
    return 0


def open_stores(preset: str, config: Pretrain, log: RunLog) -> tuple[Store, Store | None]:
    """Images to train on, and labelled ones never trained on for the kNN test (None where there are no labels)."""
    import pipeline

    if config.data.data is not None:
        train_folder, test_folder = pipeline.find_splits(config.data.data)
    elif preset == "demo":
        with log.bar("drawing the demo data set, once") as bar:
            train_folder, test_folder = pipeline.find_splits(pipeline.demo_folder(pipeline.cache_folder(), bar))
    else:
        raise ValueError(f"{preset} needs images: --data DIR or FILE")

    def opened(folder: Path) -> Store:
        with log.bar(f"indexing {folder}") as bar:
            store = pipeline.open_store(folder, bar)
        log.say_rejects("left out", {str(folder / name): reason for name, reason in store.rejects.items()})
        return store

    train_store = opened(train_folder)
    if not train_store.classes:
        log.say(f"{train_folder} has no labels (or images beside class folders): no kNN test, which needs them")
        return train_store, None
    if test_folder is not None:
        test_store = opened(test_folder)
        if test_store.classes == train_store.classes:
            return train_store, test_store
        log.say(f"{test_folder} has other classes than {train_folder}: not used")
    share = min(config.data.hold_out, _KNN_QUERIES / len(train_store))
    train_part, test_part = pipeline.hold_out(train_store, share, config.run.seed)
    log.say(f"{len(test_part):,} images are kept out of training for the kNN test (--hold-out)")
    return train_part, test_part


if __name__ == "__main__":
    name, configuration = parse()
    try:
        with RunLog() as run_log:
            status = main(name, configuration, run_log)
    except Exception as error:
        if os.environ.get("TWINFEED_TRACEBACK"):
            raise
        sys.exit(f"error: {runlog.explain(error)}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(status)
