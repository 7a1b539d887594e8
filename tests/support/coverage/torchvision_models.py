"""One model of every family of torchvision's classifiers, segmenters and detectors, and its comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from support.coverage.comparison import Row, compare
from support.coverage.models import image, outputs, prepared


def losses(model: nn.Module, x: Tensor) -> Tensor:
    """The losses of a detector in train mode, for one object in each image, each at another place."""
    targets = []
    for number, picture in enumerate(x):
        left, top = picture.shape[-1] * (1 + number) / 8, picture.shape[-2] / 4
        right, bottom = left + picture.shape[-1] / 2, top + picture.shape[-2] / 2
        mask = torch.zeros(1, *picture.shape[-2:], dtype=torch.uint8)
        mask[:, int(top) : int(bottom), int(left) : int(right)] = 1
        corners = [[left + 2, top + 2, 1], [right - 2, bottom - 2, 1], [right - 2, top + 2, 1]]
        targets.append(
            {
                "boxes": x.new_tensor([[left, top, right, bottom]]),
                "labels": torch.tensor([1 + number]),
                "masks": mask,
                "keypoints": torch.tensor([(corners * 6)[:17]]),  # no other dtype is taken
            }
        )
    return torch.stack(list(model(list(x), targets).values()))


@dataclass(frozen=True)
class Case:
    """The model that represents a family.

    Args:
        model: a name for `torchvision.models.get_model`.
        size: height and width of the input.
        options: of the model; most make it smaller.
        step: how the model is run, to one tensor.
        batch: the number of images.
    """

    model: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    step: Callable[[nn.Module, Tensor], Tensor] = outputs
    batch: int = 2


TINY = {"num_classes": 3, "min_size": 64, "max_size": 64}
FEW = TINY | {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 50}

CASES = {
    "alexnet": Case("alexnet", 64),
    "convnext": Case("convnext_tiny", 32),
    "densenet": Case("densenet121", 32),
    "efficientnet": Case("efficientnet_b0", 64),
    "googlenet": Case("googlenet", 64, {"init_weights": False}),
    "inception": Case("inception_v3", 80, {"init_weights": False, "aux_logits": False}),
    "maxvit": Case("maxvit_t", 224, batch=1),
    "mnasnet": Case("mnasnet0_5", 64),
    "mobilenetv2": Case("mobilenet_v2", 32),
    "mobilenetv3": Case("mobilenet_v3_small", 64),
    "regnet": Case("regnet_x_400mf", 32),
    "resnet": Case("resnet18", 32),
    "shufflenetv2": Case("shufflenet_v2_x0_5", 64),
    "squeezenet": Case("squeezenet1_1", 64),
    "swin_transformer": Case("swin_t", 64),
    "vgg": Case("vgg11", 32),
    "vision_transformer": Case("vit_b_32", 64, {"image_size": 64}),
    "segmentation.deeplabv3": Case("deeplabv3_mobilenet_v3_large", 64),
    "segmentation.fcn": Case("fcn_resnet50", 32, {"aux_loss": True}),
    "segmentation.lraspp": Case("lraspp_mobilenet_v3_large", 64),
    "detection.faster_rcnn": Case("fasterrcnn_mobilenet_v3_large_320_fpn", 64, FEW, losses),
    "detection.fcos": Case("fcos_resnet50_fpn", 64, TINY, losses),
    "detection.keypoint_rcnn": Case("keypointrcnn_resnet50_fpn", 64, FEW, losses),
    "detection.mask_rcnn": Case("maskrcnn_resnet50_fpn", 64, FEW, losses),
    "detection.retinanet": Case("retinanet_resnet50_fpn", 64, TINY, losses),
    "detection.ssd": Case("ssd300_vgg16", 64, {"num_classes": 3}, losses, batch=1),
    "detection.ssdlite": Case("ssdlite320_mobilenet_v3_large", 64, {"num_classes": 3}, losses),
}
"""The model of each module with builders in `torchvision.models`."""

IDS = sorted(CASES)


def family_of(model: str) -> str:
    """The module of a model's builder."""
    return models.get_model_builder(model).__module__.removeprefix("torchvision.models.")


def fill(row: Row) -> None:
    """Compare the model of `row.case`, and put the measurements into `row`.

    Raises:
        AssertionError: the patched model disagrees with an oracle.
    """
    case = CASES[row.case]
    row.family, row.model = row.case, case.model
    options = {"num_classes": 10, **case.options}
    if "." in row.family:
        options["weights_backbone"] = None
    model = prepared(models.get_model(case.model, weights=None, **options))
    compare(model, image(case.batch, 3, case.size, case.size), row, step=case.step)
