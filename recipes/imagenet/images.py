"""The images of resnet18.py: an ImageNet folder, its checks, and generated images for the smoke run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, as in torchvision


def image_folders(root: Path, size: int) -> tuple[ImageFolder, ImageFolder]:
    """Return the datasets in `root`/train, augmented, and `root`/val; files are read on demand.

    Raises:
        FileNotFoundError: A folder is missing, or a class has no images.
        ValueError: Images are outside the class folders, or train and val have different classes.
    """
    augment = (transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip())
    center = (transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size))
    folders = []
    for split, crop in (("train", augment), ("val", center)):
        _check_folder(root / split)
        prepare = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        try:
            folders.append(ImageFolder(str(root / split), prepare, loader=load_image))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{root / split}: {error}") from error
    train, test = folders
    for there, here in ((train, test), (test, train)):
        if missing := sorted({*there.classes} - {*here.classes}):
            raise ValueError(
                f"the classes of train and val differ: {here.root} lacks {len(missing)} class folders "
                f"that {there.root} has: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
            )
    return train, test


def _check_folder(folder: Path) -> None:
    """Raise FileNotFoundError or ValueError unless `folder` holds class folders and no loose images."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: set --root to the folder that holds train/CLASS/IMAGE and "
            "val/CLASS/IMAGE"
        )
    entries = list(folder.iterdir())
    loose = sum(entry.suffix.lower() in IMG_EXTENSIONS for entry in entries)
    archives = sum(entry.suffix.lower() == ".tar" for entry in entries)
    if loose and folder.name == "val":
        sort = f"import torchvision; torchvision.datasets.ImageNet('{folder.parent}', 'val')"
        raise ValueError(
            f"{loose} images are directly in {folder}, but each must be in the folder of its class, such as "
            f"{folder}/n01440764. The archive is not sorted; torchvision can sort it: move this folder away, "
            f"put ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into {folder.parent}, "
            f'and run python -c "{sort}"'
        )
    if loose:
        raise ValueError(f"{loose} images are directly in {folder}; each must be in the folder of its class")
    if archives:
        raise ValueError(
            f"{folder} holds {archives} archives (.tar): unpack each into a folder of the same name"
        )
    if not any(entry.is_dir() for entry in entries):
        raise FileNotFoundError(f"{folder} holds no class folders")


def load_image(path: str) -> Image.Image:
    """Read an image as RGB.

    Raises:
        OSError: The image cannot be read; the error names the file.
    """
    try:
        return default_loader(path)
    except OSError as error:
        raise OSError(f"{path} cannot be read as an image: {error}") from error


def make_images(root: Path, classes: int = 3, train: int = 16, test: int = 8) -> None:
    """Write an ImageNet folder of noise, 64 x 80 pixels, with one base color per class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for label in range(classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 128, (64, 80, 3)) + 127 * (np.arange(3) == label % 3)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.JPEG")
