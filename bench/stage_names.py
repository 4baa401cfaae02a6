"""The stages of training that `python -m bench` measures, from the disk to the update.

An image is read, decoded, cropped, distorted, copied to the GPU, and trained on. Each of these
stages is measured alone, and then several of them at once. "The feed" is everything before the
training step, and "end to end" is the feed and the step together: real training.
"""

from __future__ import annotations

PLAN = "plan"
COLD = "cold read"
WARM = "warm read"
DECODE = "decode"
TWO_CROPS = "decode, two crops"
DISTORT = "distort"
COPY = "copy to the GPU"
ONE_CORE = "feed, one core"
FEED = "feed"
STEP = "step"
E2E = "end to end"

# In the order in which they are measured.
DESCRIPTIONS = {
    PLAN: "the order, the random parameters and the labels of each batch",
    COLD: "encoded images from the disk, with one thread for each core",
    WARM: "encoded images from the system's file cache",
    DECODE: "whole images, decoded from memory",
    TWO_CROPS: "images decoded from memory, then cropped and resized twice",
    DISTORT: "crops to finished views",
    COPY: "crops from pinned memory to the GPU",
    ONE_CORE: "everything from cached files to finished views, on one core",
    FEED: "everything from cached files to finished views, on all cores",
    STEP: "training steps on views that are already on the device",
    E2E: "the feed and the step at the same time: training",
}
