"""A sweep for a page, and a page taken apart."""

from __future__ import annotations

import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from feedbackhook import Recorder
from feedbackhook.experiments.config import SweepConfig, SweepProtocolConfig
from feedbackhook.experiments.sweep.grid import PlannedRun
from support.run_folders import leave_run
from support.sweeps import left

FOLDER = "imagefolder:/data/<script>window.injected=1</script>/birds"  # a name that would be a script


CONDITIONS = [
    "SGD",
    "BN+BM",
    "brSF+BN+BM concordance=0.5",
    "brSF+BN+BM",
    "frSF+BN+BM concordance=0.5",
    "frSF+BN+BM concordance=1",
]


REASON = "</script><script>window.injected=1</script><img src=x onerror='window.injected=1'> & disk full"


FAILED, UNSTARTED = "MNIST-BN+BM-rate0.1-seed0", "birds-BN+BM-rate0.1-seed1"


def make(folder: Path, conditions: list[str], datasets: list[str], **protocol: Any) -> list[PlannedRun]:
    """The plan of a sweep whose runs are yet to be left in their folders."""
    config = SweepConfig(conditions, datasets, protocol=SweepProtocolConfig(**protocol), output=str(folder))
    config.model.name = "liao2016/mnist"
    return left(config)


def add_angles(run: PlannedRun, epochs: int) -> None:
    """What a run records of layers beside what `leave_run` does."""
    with Recorder(run.folder.path, append=True) as recorder:
        for epoch in range(1, epochs + 1):
            for depth, layer in enumerate(("conv1", "fc2")):
                value = 80.0 - epoch if depth else float("nan")  # the first layer has none
                recorder.add(10 * epoch, epoch, "error_angle", value, layer, depth)


def leave_sweep(path: Path) -> Path:
    """Two learning rates and seeds of two epochs on two datasets: one run failed, one has not started, one
    was made with another version of torch, and there is a folder of no planned run."""
    for place, run in enumerate(
        make(path, CONDITIONS, ["MNIST", FOLDER], epochs=2, lr_factors=[1.0, 0.1], seeds=2)
    ):
        if run.name == UNSTARTED:
            continue
        error = 1 + (7 * place) % 31 + run.seed / 3
        leave_run(run.config, [(90.0, 90.0), (2 * error, 50.0), (error, 40.0)], 2)
        if run.name == FAILED:
            result = run.folder.result()
            assert result is not None
            result.status, result.reason = "failed", REASON
            run.folder.write_result(result)
        elif "SF" in run.condition and run.lr_factor == 0.1:
            add_angles(run, 2)
    other = path / "MNIST-SGD-rate1-seed0" / "config.yaml"
    content = yaml.safe_load(other.read_text())
    content["provenance"]["versions"]["torch"] = "2.8.0+other"
    other.write_text(yaml.safe_dump(content))
    shutil.copytree(path / "MNIST-SGD-rate1-seed0", path / "<b>old<b>")
    return path


class Parsed(HTMLParser):
    """Elements with their attributes, and the text within those that the tests look into."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}  # by the id of the element or section
        self.cells: dict[tuple[str | None, str | None], str] = {}
        self.headings: list[str] = []
        self._path: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self._path.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._path.pop()[0] == tag, "elements are nested and closed"

    def handle_data(self, data: str) -> None:
        if self._path and self._path[-1][0] in ("h1", "h2"):
            self.headings.append(data)
        for tag, attributes in self._path:
            if tag == "b" and attributes.get("class") != "rule":
                cell = next(each for name, each in reversed(self._path) if name == "td")
                place = (cell["data-condition"], cell["data-dataset"])
                self.cells[place] = self.cells.get(place, "") + data
            for name in ("id", "aria-labelledby"):
                if key := attributes.get(name):
                    self.texts[key] = self.texts.get(key, "") + data


def csv(parsed: Parsed, name: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(json.loads(parsed.texts["data"])[name]))
