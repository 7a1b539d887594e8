"""The paper's datasets: what they are, where they come from, and what is drawn from them.

The paper is Liao, Leibo and Poggio 2016. Where it draws classes or images at random, it does not publish
which: the draws here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Draw:
    """A random choice of classes and of images from a folder of classes.

    Args:
        of: classes that the folder holds when it is whole, those in `without` not counted.
        train: training images drawn from each class.
        test: test images drawn from what is left of it.
        least_test: how few these may be where no more are left.
        without: folders that are no class of the draw.
        large_enough: draw from the classes alone that have images enough. Else each class that is drawn must.
    """

    of: int
    train: int
    test: int
    least_test: int
    without: tuple[str, ...] = ()
    large_enough: bool = False

    @property
    def least(self) -> int:
        """Images that a class must have."""
        return self.train + self.least_test


@dataclass(frozen=True)
class Dataset:
    """One of the paper's datasets.

    Args:
        name: what `data.name` takes.
        paper_name: its name in the paper's tables.
        network: the paper's network for it, a name of `feedbackhook.experiments.networks.NETWORKS`.
        classes: as published, or of the paper's draw.
        train: training images.
        test: test images; of a draw, the most that there can be.
        source: its home page.
        licence: what its authors state there.
        downloads: whether torchvision can download it.
        where: its files or its folder, relative to `data.root`, as torchvision lays them out.
        draw: how its classes and images are drawn; None: the split that it comes with.
    """

    name: str
    paper_name: str
    network: str
    classes: int
    train: int
    test: int
    source: str
    licence: str
    downloads: bool
    where: tuple[str, ...]
    draw: Draw | None = None

    @property
    def test_at_most(self) -> bool:
        """Whether there may be fewer test images than `test`."""
        return self.draw is not None and self.draw.least_test < self.draw.test


_NOT_STATED = "not stated by its authors"
PAPER: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="MNIST",
            paper_name="MNIST",
            network="liao2016/mnist",
            classes=10,
            train=60_000,
            test=10_000,
            source="http://yann.lecun.com/exdb/mnist/",
            licence=_NOT_STATED,
            downloads=True,
            where=("MNIST",),
        ),
        Dataset(
            name="CIFAR10",
            paper_name="CIFAR-10",
            network="liao2016/cifar",
            classes=10,
            train=50_000,
            test=10_000,
            source="https://www.cs.toronto.edu/~kriz/cifar.html",
            licence=_NOT_STATED,
            downloads=True,
            where=("cifar-10-batches-py",),
        ),
        Dataset(
            name="CIFAR100",
            paper_name="CIFAR-100",
            network="liao2016/cifar",
            classes=100,
            train=50_000,
            test=10_000,
            source="https://www.cs.toronto.edu/~kriz/cifar.html",
            licence=_NOT_STATED,
            downloads=True,
            where=("cifar-100-python",),
        ),
        Dataset(
            name="SVHN",
            paper_name="SVHN",
            network="liao2016/svhn",
            classes=10,
            train=73_257,
            test=26_032,
            source="http://ufldl.stanford.edu/housenumbers/",
            licence="non-commercial use only",
            downloads=True,
            where=("train_32x32.mat", "test_32x32.mat"),
        ),
        Dataset(
            name="STL10",
            paper_name="STL-10",
            network="liao2016/images",
            classes=10,
            train=5_000,
            test=8_000,
            source="https://cs.stanford.edu/~acoates/stl10/",
            licence=_NOT_STATED,
            downloads=True,
            where=("stl10_binary",),
        ),
        Dataset(
            name="Caltech101",
            paper_name="Caltech101",
            network="liao2016/images",
            classes=102,  # BACKGROUND_Google is one of them
            train=102 * 30,
            test=102 * 10,
            source="https://data.caltech.edu/records/mzrjq-6wc02",
            licence="CC BY 4.0",
            downloads=True,
            where=("caltech101/101_ObjectCategories",),
            draw=Draw(of=102, train=30, test=10, least_test=1),
        ),
        Dataset(
            name="Caltech256-101",
            paper_name="Caltech256-101",
            network="liao2016/images",
            classes=102,
            train=102 * 30,
            test=102 * 10,
            source="https://data.caltech.edu/records/nyy15-4j048",
            licence=_NOT_STATED,
            downloads=True,
            where=("caltech256/256_ObjectCategories",),
            draw=Draw(of=256, train=30, test=10, least_test=10, without=("257.clutter",)),
        ),
        Dataset(
            name="Flowers102",
            paper_name="Flowers102",
            network="liao2016/images",
            classes=102,
            train=1_020,
            test=6_149,
            source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
            licence=_NOT_STATED,
            downloads=True,
            where=("flowers-102",),
        ),
        Dataset(
            name="LFW-ID",
            paper_name="LFW-ID",
            network="liao2016/images",
            classes=80,
            train=80 * 10,
            test=80 * 5,
            source="http://vis-www.cs.umass.edu/lfw/",
            licence=_NOT_STATED,
            downloads=False,
            where=("lfw-py/lfw_funneled",),
            draw=Draw(of=5_749, train=10, test=5, least_test=5, large_enough=True),
        ),
    )
}
"""By the names that `data.name` takes: those of the paper's datasets that torchvision reads."""
