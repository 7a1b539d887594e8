"""Reads iCubWorld 1.0 with its test set `categorization`."""

from __future__ import annotations

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data.image_folder import matching_classes
from feedbackhook.experiments.data.items import Sources, root
from feedbackhook.experiments.data.registry import Dataset
from feedbackhook.liao2016.files import check_paths


def read(dataset: Dataset, config: DataConfig) -> Sources:
    """Find the images in train/CATEGORY and test/categorization/CATEGORY, or in folders of objects inside
    those."""
    train, test = (root(config) / path for path in dataset.paths)
    found = check_paths(dataset, config, [train, test])
    return found if found.problems else matching_classes({"train": train, "test": test}, found)
