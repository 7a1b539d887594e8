"""Reads SUFR-W-ID: a draw of people from SUFR-W 1.3."""

from __future__ import annotations

import re
from pathlib import Path

from feedbackhook.experiments.config import DataConfig
from feedbackhook.experiments.data.items import Sources, root
from feedbackhook.experiments.data.registry import Dataset
from feedbackhook.liao2016.draws import SAME, draw_images
from feedbackhook.liao2016.files import check_paths


def read(dataset: Dataset, config: DataConfig) -> Sources:
    """Find the images 1.jpg, 2.jpg, ... in one folder, and draw from them. Line n of the text file beside
    them, `ID # NAME`, says who is in image n."""
    folder = root(config) / dataset.paths[0]
    info = folder / "SUFR_in_the_wild_info.txt"
    found = check_paths(dataset, config, [folder, info])
    if found.problems:
        return found
    numbers = {int(path.stem): path for path in folder.glob("*.jpg") if path.stem.isdecimal()}
    people = info.read_text("utf-8", "surrogateescape").rstrip().splitlines()
    images = _images_of_people(people, folder, info, found.problems)
    found.problems += [
        f"{path} is not listed in {info}, which ends at line {len(people)}"
        for number, path in sorted(numbers.items())
        if not 1 <= number <= len(people)
    ]
    draw_images(images, lambda person: f"{folder} ({person})", dataset, folder, found)
    missing = [str(folder / f"{number}.jpg") for number in range(1, len(people) + 1) if number not in numbers]
    drawn = {item.name for items in found.splits.values() for item in items}
    if needed := [path for path in missing if path in drawn or not found.splits]:
        found.problems += [f"{path} is missing, but {info} lists it" for path in needed]
        found.splits = {}
    elif missing:
        count = f"{len(people) - len(missing):,} of the {len(people):,} images"
        found.differs.append(f"{folder} contains {count} that {info.name} lists; {SAME}")
    found.folder = [item for item in found.folder or [] if item.name not in set(missing)]
    return found


def _images_of_people(
    lines: list[str], folder: Path, info: Path, problems: list[str]
) -> dict[str, list[str]]:
    """The images of each person, which need not exist unless they are drawn."""
    images: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"\s*(\d+)\s*#\s*(.*\S)\s*", line)
        if match is None:
            problems.append(f"{info} is damaged: line {number} is not 'ID # NAME'")
            continue
        images.setdefault(f"{int(match[1])} {match[2]}", []).append(str(folder / f"{number}.jpg"))
    return images
