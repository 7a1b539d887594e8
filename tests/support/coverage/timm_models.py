"""One small model of every architecture module of timm, and its comparison."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

import feedbackhook
from support.coverage.comparison import Row, compare
from support.coverage.models import image, prepared
from support.coverage.replaced_functions import RULE


@dataclass(frozen=True)
class Case:
    """The model that represents a module of timm.

    Args:
        model: a name for `timm.create_model`, or of a class in the module, where the former cannot be made
            small.
        size: height and width of the input.
        options: of the model; most make it smaller.
        exclude: layers that stay exact, since `patch` refuses the model otherwise (see `REFUSED`).
        shorten: sequences of blocks, cut to their first two.
        only_functions: why the saved-tensor oracle is blind to this model, if it is.
    """

    model: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    exclude: tuple[type[nn.Module], ...] = ()
    only_functions: str = ""
    shorten: tuple[str, ...] = ()

    def describe(self) -> str:
        """For the table: the model, and the options that make it smaller."""
        smaller = [f"{key}={value}" for key, value in self.options.items() if key != "img_size"]
        smaller += [f"{name}[:2]" for name in self.shorten]
        return f"{self.model} ({', '.join(smaller)})" if smaller else self.model

    def build(self, module: str) -> nn.Module:
        """The model, ready to be compared."""
        options = {"num_classes": 10, **self.options}
        if self.model[0].isupper():
            made = getattr(importlib.import_module(f"timm.models.{module}"), self.model)(**options)
        else:
            made = timm.create_model(self.model, pretrained=False, **options)
        for name in self.shorten:
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, made.get_submodule(name)[:2])
        return prepared(made)


CASES = {
    "beit": Case("beit_base_patch16_224", 48, {"img_size": 48, "depth": 2, "embed_dim": 96, "num_heads": 3}),
    "byoanet": Case("halonet_h1", 256, {"img_size": 256}),
    "byobnet": Case("test_byobnet", 32, {"img_size": 32}),
    "cait": Case("cait_xxs24_224", 32, {"img_size": 32, "depth": 2}),
    "coat": Case("coat_tiny", 32, {"img_size": 32}),
    "convit": Case("convit_tiny", 32, {"img_size": 32}),
    "convmixer": Case("ConvMixer", 64, {"dim": 64, "depth": 3}),
    "convnext": Case("test_convnext", 64),
    "cpubone": Case("cpubone_nano", 32),
    "crossvit": Case("crossvit_tiny_240", 32),
    "csatv2": Case("csatv2", 64),
    "cspnet": Case("cs3darknet_focus_s", 64),
    "cspnext": Case("cspnext_tiny", 64),
    "davit": Case(
        "davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8)}
    ),
    "deepseek_vit": Case(
        "deepseek_vit_412m", 84, {"img_size": 84, "depth": 2, "embed_dim": 96, "num_heads": 3}
    ),
    "deit": Case("deit_tiny_patch16_224", 32, {"img_size": 32}),
    "densenet": Case("densenet121", 32),
    "dla": Case("dla46x_c", 64),
    "dpn": Case("dpn48b", 32),
    "edgenext": Case("edgenext_xx_small", 64),
    "efficientformer": Case("efficientformer_l1", 224, {"img_size": 224}),
    "efficientformer_v2": Case("efficientformerv2_s0", 32, {"img_size": 32}),
    "efficientnet": Case("test_efficientnet", 64),
    "efficientvim": Case("efficientvim_m1", 32),
    "efficientvit_mit": Case("efficientvit_b0", 64),
    "efficientvit_msra": Case("efficientvit_m0", 32, {"img_size": 32}),
    "eva": Case("vit_tiny_patch16_dinov3_qkvb", 32, {"img_size": 32}),
    "fasternet": Case("fasternet_t0", 64),
    "fastvit": Case("fastvit_t8", 32),
    "focalnet": Case("FocalNet", 64, {"depths": (1, 1, 2, 1), "embed_dim": 48}),
    "gcvit": Case("gcvit_xxtiny", 32, {"img_size": 32}),
    "gemma4_vit": Case(
        "gemma4_vit_167m_enc",
        96,
        {
            "img_size": 96,
            "depth": 2,
            "embed_dim": 96,
            "num_heads": 3,
            "head_dim": 32,
            "intermediate_size": 192,
        },
    ),
    "ghostnet": Case("ghostnet_050", 64),
    "hardcorenas": Case("hardcorenas_b", 64),
    "hgnet": Case("hgnetv2_b0", 64),
    "hiera": Case("hiera_tiny_224", 64, {"img_size": 64, "embed_dim": 48, "stages": (1, 2, 2, 1)}),
    "hieradet_sam2": Case(
        "sam2_hiera_tiny",
        64,
        {"embed_dim": 24, "num_heads": 1, "stages": (1, 2, 3, 2), "global_att_blocks": (4,)},
    ),
    "hrnet": Case("hrnet_w18_small", 32),
    "iformer": Case("iformer_t", 32),
    "inception_next": Case("inception_next_atto", 32),
    "inception_resnet_v2": Case("inception_resnet_v2", 96, shorten=("repeat", "repeat_1", "repeat_2")),
    "inception_v3": Case("inception_v3", 96),
    "inception_v4": Case("inception_v4", 96),
    "lcnetv2": Case("lcnetv2_small", 32),
    "levit": Case("levit_128s", 32, {"img_size": 32}),
    "lowformer": Case("lowformer_b0", 32),
    "mambaout": Case("test_mambaout", 64),
    "maxxvit": Case("test_maxvit", 32, {"img_size": 32}),
    "metaformer": Case("poolformerv2_s12", 32),
    "mlp_mixer": Case("gmlp_ti16_224", 32, {"img_size": 32}),
    "mobilenetv3": Case("mobilenetv3_small_050", 64),
    "mobilenetv5": Case("mobilenetv5_base", 32, {"channel_multiplier": 0.25}),
    "mobilevit": Case("mobilevit_xxs", 32, {"img_size": 32}),
    "mvitv2": Case("mvitv2_tiny", 32, {"img_size": 32}),
    "naflexvit": Case("naflexvit_base_patch16_parfac_gap", 32, {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    "nasnet": Case("nasnetalarge", 32, {"num_features": 192, "stem_size": 16}),
    "nest": Case("nest_tiny", 64, {"img_size": 64}),
    "nextvit": Case("nextvit_small", 32),
    "nfnet": Case("test_nfnet", 64, only_functions="weights are standardized"),
    "pit": Case("pit_ti_224", 32, {"img_size": 32}),
    "pnasnet": Case("pnasnet5large", 32),
    "pvt_v2": Case("pvt_v2_b0", 32),
    "qwen3_vit": Case("qwen3_vit_88m", 64, {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 3}),
    "rdnet": Case("rdnet_tiny", 32),
    "regnet": Case("regnetx_002", 64),
    "repghost": Case("repghostnet_050", 32),
    "repvit": Case("repvit_m1", 32, {"img_size": 32}),
    "res2net": Case("res2next50", 32),
    "resnest": Case("resnest14d", 32),
    "resnet": Case("test_resnet", 64),
    "resnetv2": Case("resnetv2_18", 64),
    "rexnet": Case("rexnet_100", 64),
    "selecsls": Case("selecsls42", 32),
    "senet": Case("legacy_seresnet18", 64),
    "sequencer": Case("sequencer2d_s", 32, {"img_size": 32}, exclude=(nn.LSTM,)),
    "shvit": Case("shvit_s1", 64),
    "sknet": Case("skresnet18", 32),
    "starnet": Case("starnet_s050", 64),
    "swiftformer": Case("swiftformer_xs", 32, {"img_size": 32}),
    "swin_transformer": Case(
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "embed_dim": 24, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "swin_transformer_v2": Case(
        "swinv2_tiny_window16_256",
        64,
        {
            "img_size": 64,
            "embed_dim": 24,
            "window_size": 8,
            "depths": (2, 2, 1, 1),
            "num_heads": (1, 2, 4, 8),
        },
    ),
    "swin_transformer_v2_cr": Case(
        "swinv2_cr_tiny_224",
        64,
        {"img_size": 64, "embed_dim": 24, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "tiny_vit": Case("tiny_vit_5m_224", 32),
    "tnt": Case("tnt_s_legacy_patch16_224", 32, {"img_size": 32}),
    "tresnet": Case("tresnet_m", 32),
    "twins": Case("twins_svt_small", 32, {"img_size": 32}),
    "vgg": Case("VGG", 64, {"cfg": [8, "M", 16, "M", 16, 16, "M", 16, "M", 16]}),
    "visformer": Case("visformer_tiny", 32, {"img_size": 32}),
    "vision_transformer": Case("test_vit", 32, {"img_size": 32}),
    "vision_transformer_hybrid": Case("vit_tiny_r_s16_p8_224", 32, {"img_size": 32}),
    "vision_transformer_relpos": Case("test_vit_relpos", 32, {"img_size": 32}),
    "vision_transformer_sam": Case(
        "samvit_base_patch16_224", 64, {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 3}
    ),
    "vitamin": Case("vitamin_small_224", 32, {"img_size": 32}),
    "volo": Case("volo_d1_224", 32, {"img_size": 32}),
    "vovnet": Case("ese_vovnet19b_slim_dw", 64),
    "xception": Case("legacy_xception", 32),
    "xception_aligned": Case("xception41p", 32),
    "xcit": Case("xcit_nano_12_p8_224", 32, {"img_size": 32}),
}
"""The model of each module; `smallest` finds one for a module that is new."""

MORE = {
    "efficientnet-condconv": Case("tf_efficientnet_cc_b0_4e", 64),
    "efficientnet-mixnet": Case("mixnet_s", 64),
    "eva-eva02": Case("eva02_tiny_patch14_224", 42, {"img_size": 42}),
    "levit-conv": Case("levit_conv_128s", 32, {"img_size": 32}),
    "maxxvit-coatnet": Case("test_coatnet", 32, {"img_size": 32}),
    "mlp_mixer-mixer": Case("mixer_s32_224", 64, {"img_size": 64}),
    "resnetv2-bit": Case(
        "resnetv2_50x1_bit",
        64,
        only_functions="weights are standardized",
        shorten=tuple(f"stages.{stage}.blocks" for stage in range(4)),
    ),
}
"""Further models, by module and a word, that use their weights in another way than the module's first."""

REFUSED = {"sequencer": (TypeError, "LSTM .* computes in one fused call")}
"""Models that `patch` refuses without `exclude`, with its error."""

MODULES = sorted(timm.list_modules())
IDS = sorted([*MODULES, *(name for name in MORE if name.split("-")[0] in MODULES)])


def smallest(module: str) -> Case:
    """The model of a module with the fewest parameters, at the first size that its forward takes."""

    def parameters(name: str) -> tuple[int, str]:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        return sum(parameter.numel() for parameter in model.parameters()), name

    name = min(timm.list_models(module=module), key=parameters)
    problems = []
    for size in (32, 64, 96, 128, 160, 192, 224, 256, 384, 512):
        for options in ({"img_size": size}, {}):
            case = Case(name, size, options)
            try:
                case.build(module)(image(2, 3, size, size))
            except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as problem:
                problems.append(f"{size}: {problem}")
            else:
                return case
    raise AssertionError(f"{name} takes no input: {problems}")


def case_of(name: str) -> Case:
    """The case by its id."""
    case = MORE.get(name) or CASES.get(name)
    known = case is not None and (case.model[0].isupper() or timm.is_model(case.model))
    return case if known else smallest(name.split("-")[0])


def fill(row: Row) -> None:
    """Compare the model of `row.case`, and put the measurements into `row`.

    Raises:
        AssertionError: the patched model disagrees with an oracle.
    """
    name = row.case
    module, case = name.split("-")[0], case_of(name)
    row.family, row.model = module, case.describe()
    if name in REFUSED:
        _assert_refused(case.build(module), *REFUSED[name])
        row.result = f"ok with {', '.join(kind.__name__ for kind in case.exclude)} excluded, refused without"
    compare(
        case.build(module),
        image(2, 3, case.size, case.size),
        row,
        exclude=case.exclude,
        saved_tensors=not case.only_functions,
    )
    if case.only_functions:
        row.result += f"; {case.only_functions}"


def _assert_refused(model: nn.Module, error: type[Exception], message: str) -> None:
    said = None
    try:
        feedbackhook.patch(model, **RULE)
    except error as refusal:
        said = str(refusal)
    assert said is not None, "patch no longer refuses the model: nothing need be excluded"
    assert re.search(message, said), f"refused for another reason: {said}"
