"""Reads Caltech101, Caltech256-101, PubFig83-ID and LFW-ID: draws from one folder of classes."""

from __future__ import annotations

from pathlib import Path

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data import torchvision_sets
from feedbackhook.experiments.data.image_folder import class_images
from feedbackhook.experiments.data.items import Sources, hint_if_missing, root
from feedbackhook.experiments.data.registry import Dataset
from feedbackhook.liao2016.draws import draw_images


def read(dataset: Dataset, config: DataConfig) -> Sources:
    """Find the images in CLASS/IMAGE and draw from them."""
    assert dataset.draw is not None
    name = dataset.name.partition("-")[0]  # as torchvision or its authors call it
    folder = root(config) / dataset.paths[0]
    download = config.download and dataset.downloadable and not folder.is_dir()
    failure = torchvision_sets.download(name, config) if download else None
    if not folder.is_dir():
        hint = hint_if_missing(config, dataset.downloadable, failure, dataset.home_page)
        return Sources(problems=[f"{folder} is missing"], hint=hint)
    found = Sources(hint=f"delete {folder} and unpack {name} again")
    images = {
        label: [path for path in paths if Path(path).parent.name == label]  # Caltech256 has folders inside
        for label, paths in class_images(folder, found.problems).items()
        if label not in dataset.draw.exclude
    }
    draw_images(images, lambda label: folder / label, dataset, folder, found)
    return found
