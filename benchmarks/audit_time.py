"""How long does one audit take? The median of several, on one thread, for some timm models.

python benchmarks/audit_time.py
"""

from __future__ import annotations

import statistics
import time

import timm
import torch

import feedbackhook

MODELS = (
    "resnet18",
    "resnet50",
    "vit_tiny_patch16_224",
    "convnext_tiny",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
)
AUDITS = 9


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}: forward at 224 pixels, batch of 1")
    for name in MODELS:
        model = timm.create_model(name, num_classes=10)
        patch = feedbackhook.patch(model, "sign")
        output = model(torch.randn(1, 3, 224, 224))
        times = []
        for _ in range(AUDITS):
            start = time.perf_counter()
            assert not patch.audit(output)
            times.append(time.perf_counter() - start)
        print(f"{name:30} {len(patch.layers):4} layers {1000 * statistics.median(times):7.1f} ms per audit")


if __name__ == "__main__":
    main()
