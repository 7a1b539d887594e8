"""Checks that the files of a dataset in its published layout are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data.image_folder import image_item
from feedbackhook.experiments.data.items import Item, Sources, hint_if_missing
from feedbackhook.experiments.data.registry import Dataset


def check_paths(dataset: Dataset, config: DataConfig, paths: Sequence[Path]) -> Sources:
    """Return no samples yet, but which of ``paths`` are missing, and what to do about this and about problems
    found later."""
    problems = [f"{path} is missing" for path in paths if not path.exists()]
    hint = f"get {dataset.name} again from {dataset.home_page}, and replace the files with it"
    if len(problems) == len(paths):
        hint = hint_if_missing(config, downloadable=False, home_page=dataset.home_page)
    elif problems:
        hint = f"get the missing files from {dataset.home_page}"
    return Sources(problems=problems, hint=hint)


def existing_images(paths: Sequence[tuple[Path, int]], named_by: Path, problems: list[str]) -> list[Item]:
    """Return the images of these paths and classes that exist; add the others to ``problems``.

    Args:
        paths: path and class of each image.
        named_by: the file that lists them.
        problems: receives a line for each missing file.
    """
    problems += [f"{path} is missing, but {named_by} lists it" for path, _ in paths if not path.is_file()]
    return [image_item(str(path), label) for path, label in paths if path.is_file()]
