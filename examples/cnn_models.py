"""Networks for images in plain PyTorch: nothing in them knows about quantization.

    resnet8(), resnet20()      three stages of 3x3 blocks for images of 28 to 32 pixels
    resnet18(), resnet50()     four stages, 7x7 stem and pooling; `small_stem=True` for images under 100 pixels
    mobilenet_v2()             inverted bottlenecks with depthwise convolutions; `small_stem=True` likewise
    vit()                      a transformer over patches, for images of `image` pixels (`vit.py`)
    efficientnet_lite0()       with ImageNet's weights, where their package is installed (`pretrained.py`)

Every maker takes `classes`, `channels` (of the image) and `width`, a factor on all inner channel counts. Layers are
plain `nn.Conv2d`, `nn.BatchNorm2d`, `nn.ReLU` and `nn.Linear`, so that sites have names such as `stages.0.1.conv2`.
The classifier is `head`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pretrained import efficientnet_lite0
from torch import Tensor, nn
from vit import vit

# N images, C channels, H x W pixels


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Without bias: a norm follows every convolution."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The way around a residual block: a projection where shapes change."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    expansion = 1  # output channels over `width`

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = F.relu(self.norm1(self.conv1(x_NCHW)))
        return F.relu(self.norm2(self.conv2(y_NCHW)) + self.shortcut(x_NCHW))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = _conv(inputs, width, 1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = F.relu(self.norm1(self.conv1(x_NCHW)))
        y_NCHW = F.relu(self.norm2(self.conv2(y_NCHW)))
        return F.relu(self.norm3(self.conv3(y_NCHW)) + self.shortcut(x_NCHW))


class ResNet(nn.Module):
    """Residual blocks in stages; each stage after the first halves the image and has its own width."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        stem: nn.Module,
        stem_width: int,
        classes: int,
    ):
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList()
        inputs = stem_width
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            layers = []
            for index in range(count):
                layers.append(block(inputs, width, stride=2 if stage > 0 and index == 0 else 1))
                inputs = width * block.expansion
            self.stages.append(nn.Sequential(*layers))
        self.head = nn.Linear(inputs, classes)
        _initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images f[N, C, H, W] -> logits f[N, classes]."""
        x_NCHW = self.stem(x_NCHW)
        for stage in self.stages:
            x_NCHW = stage(x_NCHW)
        return self.head(x_NCHW.mean((2, 3)))


class InvertedBottleneck(nn.Module):
    """1x1 up, depthwise 3x3, 1x1 down without activation; a residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        layers = _conv_norm_relu6(inputs, width, 1) if expansion != 1 else []
        self.layers = nn.Sequential(
            *layers,
            *_conv_norm_relu6(width, width, 3, stride, groups=width),
            _conv(width, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.layers(x_NCHW)
        return x_NCHW + y_NCHW if self.residual else y_NCHW


class MobileNetV2(nn.Module):
    # expansion, channels, blocks, stride of the first block
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, *, classes: int, channels: int, width: float, small_stem: bool):
        super().__init__()
        inputs = _scaled(32, width)
        self.stem = nn.Sequential(*_conv_norm_relu6(channels, inputs, 3, 1 if small_stem else 2))
        blocks = []
        for index, (expansion, outputs, count, stride) in enumerate(self.STAGES):
            outputs = _scaled(outputs, width)
            if small_stem and index < 3:  # 28 to 32 pixels end at 7 to 8, as 224 do without
                stride = 1 if index < 2 else 2
            for repeat in range(count):
                blocks.append(InvertedBottleneck(inputs, outputs, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        outputs = max(1280, _scaled(1280, width)) if width >= 1 else _scaled(1280, width)
        self.last = nn.Sequential(*_conv_norm_relu6(inputs, outputs, 1))
        self.head = nn.Linear(outputs, classes)
        _initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images f[N, C, H, W] -> logits f[N, classes]."""
        return self.head(self.last(self.blocks(self.stem(x_NCHW))).mean((2, 3)))


def _conv_norm_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [_conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU6()]


def _scaled(channels: int, width: float) -> int:
    """A multiple of 8, at least 8."""
    return max(8, int(channels * width + 4) // 8 * 8)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def _cifar_resnet(blocks: int, classes: int, channels: int, width: float) -> ResNet:
    widths = tuple(_scaled(w, width) for w in (16, 32, 64))
    stem = nn.Sequential(_conv(channels, widths[0], 3), nn.BatchNorm2d(widths[0]), nn.ReLU())
    return ResNet(BasicBlock, (blocks,) * 3, widths, stem=stem, stem_width=widths[0], classes=classes)


def resnet8(*, classes: int = 10, channels: int = 3, width: float = 1.0) -> ResNet:
    """78 thousand parameters: one block a stage."""
    return _cifar_resnet(1, classes, channels, width)


def resnet20(*, classes: int = 10, channels: int = 3, width: float = 1.0) -> ResNet:
    """272 thousand parameters: three blocks a stage."""
    return _cifar_resnet(3, classes, channels, width)


def _imagenet_resnet(
    block: type[BasicBlock] | type[Bottleneck],
    blocks: tuple[int, ...],
    classes: int,
    channels: int,
    width: float,
    small_stem: bool,
) -> ResNet:
    widths = tuple(_scaled(w, width) for w in (64, 128, 256, 512))
    first = _conv(channels, widths[0], 3) if small_stem else _conv(channels, widths[0], 7, 2)
    stem = nn.Sequential(first, nn.BatchNorm2d(widths[0]), nn.ReLU())
    if not small_stem:
        stem.append(nn.MaxPool2d(3, 2, padding=1))
    return ResNet(block, blocks, widths[: len(blocks)], stem=stem, stem_width=widths[0], classes=classes)


def resnet18(*, classes: int = 1000, channels: int = 3, width: float = 1.0, small_stem: bool = False) -> ResNet:
    """11.7 million parameters. small_stem: a 3x3 convolution without stride or pooling, for small images."""
    return _imagenet_resnet(BasicBlock, (2, 2, 2, 2), classes, channels, width, small_stem)


def resnet50(
    *,
    classes: int = 1000,
    channels: int = 3,
    width: float = 1.0,
    small_stem: bool = False,
    blocks: tuple[int, ...] = (3, 4, 6, 3),
) -> ResNet:
    """25.6 million parameters. blocks: of each stage, fewer for a network of the same kind that compiles sooner."""
    return _imagenet_resnet(Bottleneck, blocks, classes, channels, width, small_stem)


def mobilenet_v2(
    *, classes: int = 1000, channels: int = 3, width: float = 1.0, small_stem: bool = False
) -> MobileNetV2:
    """3.5 million parameters. small_stem: an eighth of the image's size is the smallest, not a thirty-second."""
    return MobileNetV2(classes=classes, channels=channels, width=width, small_stem=small_stem)


MODELS: dict[str, Callable[..., nn.Module]] = {
    make.__name__: make for make in (resnet8, resnet20, resnet18, resnet50, mobilenet_v2, vit, efficientnet_lite0)
}
PRETRAINED = ("efficientnet_lite0",)
SMALL_IMAGE = 100  # pixels: below it networks made for ImageNet take their small stem


def build(name: str, **arguments: object) -> nn.Module:
    """A model by name. Errors: ValueError for an unknown one."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    return MODELS[name](**arguments)


def build_for(name: str, *, image: int, **arguments: object) -> nn.Module:
    """A model by name for images of so many pixels on a side: with the small stem, or the positions, that these ask for."""
    takes = inspect.signature(MODELS[name]).parameters if name in MODELS else {}
    if "small_stem" in takes:
        arguments["small_stem"] = image < SMALL_IMAGE
    if "image" in takes:
        arguments["image"] = image
    return build(name, **arguments)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    for name in (n for n in MODELS if n not in PRETRAINED):
        model = build(name)
        image = torch.zeros(2, 3, 32, 32)
        print(f"{name}: {count_parameters(model) / 1e6:.3f} M parameters, {tuple(image.shape)} -> {tuple(model(image).shape)}")
