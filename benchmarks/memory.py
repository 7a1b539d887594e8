"""How much memory does a patched model need, between training steps and at their peak?

"lasting" is the size of the tensors of model, optimizer and patch between two steps, with gradients set to
None. "peak" is the most that a step allocates beyond that. On a CPU both come from PyTorch's tensors and
profiler, on a GPU from its caching allocator. V is computed when an error signal passes and freed afterwards,
so it only appears in the peak.

    python benchmarks/memory.py --model timm/resnet18 --size 64 --batch 32

Writes benchmarks/results/memory/NAME.json, and the tables of all results in that folder.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from common import (
    PEERS,
    RULES,
    Setting,
    Step,
    build_model,
    case_name,
    fresh,
    images,
    peer,
    peers_installed,
    train_step,
    write_result,
)
from jsonargparse import auto_cli
from rich.console import Console
from tables import draw, print_memory
from torch.profiler import ProfilerActivity, profile

import feedbackhook


def main(
    model: str = "liao2016/mnist",
    batch: int = 100,
    size: int | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    rules: Sequence[str] = tuple(RULES),
    peers: Sequence[str] = PEERS,
    name: str | None = None,
) -> None:
    """Measure one case, and draw the tables of all cases.

    Args:
        model: liao2016/mnist or timm/NAME.
        batch: Images per batch.
        size: Height and width in pixels (default: the model's own).
        device: cpu, cuda or cuda:N.
        dtype: Data type; bfloat16 uses autocast.
        rules: Names from `RULES` in common.py.
        peers: Modes of biotorch, if it is installed.
        name: Name of the result (default: made from the case).
    """
    setting = Setting(model, batch, size, device, dtype)
    figures = {"plain": _measured(setting)} | {rule: _measured(setting, rule) for rule in rules}
    if peers and peers_installed(Console()):
        figures |= {f"biotorch {mode}": _measured(setting, converted=mode) for mode in peers}
    patched = feedbackhook.patch(build_model(setting)[0], "sign")
    weights = sum(patched.weight(row.name).nbytes for row in patched.layers)
    name = name or case_name(setting)
    write_result("memory", name, setting, {"patched_weights": weights, "bytes": figures})
    draw()
    print_memory(Console(), name)


def _measured(setting: Setting, rule: str | None = None, converted: str | None = None) -> dict[str, int]:
    """Return the bytes between two steps, and the additional bytes at the peak of a step."""
    before = _alive(setting.device)
    start, size = build_model(setting)
    x, y = images(setting, size)
    if converted is None:
        model, called = fresh(start, setting, rule)
    else:
        model, called = peer(start, setting, converted, y)
    del start
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    step: Step = partial(train_step, called, optimizer, x, y, setting)
    for _ in range(2):
        step()
    model.zero_grad()
    lasting = _alive(setting.device) - before
    peak = _peak(step, setting.device)
    return {"lasting": lasting, "peak": peak}


def _alive(device: str) -> int:
    """Return the bytes in the storages of all tensors on the device."""
    gc.collect()
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    # exact types: isinstance would load lazy modules, and the compiler's tensors hold no memory
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _peak(step: Step, device: str) -> int:
    """Return the most bytes that a step has allocated at one time."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]  # allocated in earlier profiles
    return max(change["Total Allocated"] for change in changes) - before


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
