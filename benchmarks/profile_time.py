"""How long does `feedbackhook.profile` take for a ResNet-50 at 64 pixels?

    OMP_NUM_THREADS=2 python benchmarks/profile_time.py

The default grid (sign feedback at four concordances, and random feedback), two batches of 16 images and three
draws of each rule.
"""

from __future__ import annotations

import time

import timm
import torch
import torch.nn.functional as F

import feedbackhook


def main() -> None:
    """Profile, and print wall-clock and processor time."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=10, zero_init_last=False)
    model.to(memory_format=torch.channels_last)
    batches = [(torch.randn(16, 3, 64, 64), torch.randint(10, (16,))) for _ in range(2)]
    wall, processor = time.perf_counter(), time.process_time()
    found = feedbackhook.profile(model, batches, F.cross_entropy)
    print(found)
    print(
        f"{time.perf_counter() - wall:.0f} s, {time.process_time() - processor:.0f} s of processor time, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
