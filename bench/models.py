"""The networks of the papers' experiments, and small ones: `build(name, settings, shape, outputs)`.

They are written out here because no library that installs beside any build of torch has them in the paper's form:
timm's ConvMixer needs torchvision, whose wheel must match torch's build exactly, and neither has the ResNeXt and VGG
for 32 x 32 images. Convolutions, normalisation and initialisation are torch's, but where a comment says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .demo import CharTransformer

Shape = tuple[int, ...]

#: Convolutions in each of the last three stages of a VGG, by its depth.
VGG_DEEP_STAGES = {16: 3, 19: 4}


class Residual(nn.Sequential):
    """Adds what it is given to what its modules make of it."""

    def forward(self, x: Tensor) -> Tensor:
        """From [batch, channels, height, width] to the same."""
        return x + super().forward(x)


def convmixer(shape: Shape, outputs: int, dim: int = 256, depth: int = 8, kernel: int = 5, patch: int = 2) -> nn.Module:
    """ConvMixer-dim/depth (Trockman and Kolter, 2022); the paper's is 256/8 with kernels of 5 and patches of 2."""

    def block() -> list[nn.Module]:
        depthwise = nn.Conv2d(dim, dim, kernel, groups=dim, padding="same")
        pointwise = nn.Conv2d(dim, dim, 1)
        return [
            Residual(depthwise, nn.GELU(), nn.BatchNorm2d(dim)),
            nn.Sequential(pointwise, nn.GELU(), nn.BatchNorm2d(dim)),
        ]

    stem = [nn.Conv2d(shape[0], dim, patch, stride=patch), nn.GELU(), nn.BatchNorm2d(dim)]
    blocks = [module for _ in range(depth) for module in block()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, outputs))


def vgg(shape: Shape, outputs: int, depth: int = 16) -> nn.Module:
    """VGG of 16 or 19 layers with batch normalisation and one linear layer, as for small images."""
    if depth not in VGG_DEEP_STAGES:
        raise ValueError(f"depth of a VGG must be one of {', '.join(map(str, VGG_DEEP_STAGES))}, got {depth!r}")
    layers: list[nn.Module] = []
    channels, deep = shape[0], VGG_DEEP_STAGES[depth]
    for out, convolutions in ((64, 2), (128, 2), (256, deep), (512, deep), (512, deep)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))
    _kaiming(network)
    return network


class Bottleneck(nn.Module):
    """ResNeXt's block of type C: 1 x 1, a grouped 3 x 3 and 1 x 1 convolution beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int, cardinality: int, widen: int) -> None:
        super().__init__()
        width = cardinality * out // widen
        self.residual = nn.Sequential(
            *_convolution(into, width, 1),
            nn.ReLU(),
            *_convolution(width, width, 3, stride=stride, padding=1, groups=cardinality),
            nn.ReLU(),
            *_convolution(width, out, 1),
        )
        self.shortcut = nn.Sequential(*(_convolution(into, out, 1, stride=stride) if into != out else ()))

    def forward(self, x: Tensor) -> Tensor:
        """From [batch, into, height, width] to [batch, out, height / stride, width / stride]."""
        return F.relu(self.residual(x) + self.shortcut(x))


def resnext(shape: Shape, outputs: int, depth: int = 18, cardinality: int = 8, widen: int = 4) -> nn.Module:
    """ResNeXt for small images (Xie et al., 2017), three stages; the authors' is of depth 18, one block a stage."""
    if depth < 11:
        raise ValueError(f"depth of a ResNeXt must be at least 11, a block in each stage, got {depth!r}")
    blocks: list[nn.Module] = []
    into = 64
    for stage, width in enumerate((64, 128, 256)):
        for block in range((depth - 2) // 9):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(Bottleneck(into, width * widen, stride, cardinality, widen))
            into = width * widen
    stem = [*_convolution(shape[0], 64, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, outputs))
    _kaiming(network)
    return network


def convnet(shape: Shape, outputs: int, width: int = 16) -> nn.Module:
    """Three convolutions, each followed by batch normalisation and pooling: what trains in seconds on a CPU."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for out in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))


class GPT(nn.Module):
    """GPT-2's arrangement: pre-norm layers of torch's, and an output layer that shares the token embedding."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # GPT-2's; torch's 1 would saturate the shared output layer

    def forward(self, tokens: Tensor) -> Tensor:
        """From tokens [batch, length] to logits [batch, length, vocabulary]."""
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:length]
        x = self.layers(x, mask=self.mask[:length, :length], is_causal=True)
        return F.linear(x, self.tokens.weight)


def gpt(
    shape: Shape, outputs: int, width: int = 768, layers: int = 12, heads: int = 12, context: int = 1024
) -> nn.Module:
    """GPT-2, by default with 124M parameters for its vocabulary of 50257."""
    return GPT(outputs, width, layers, heads, context)


def char_transformer(shape: Shape, outputs: int) -> nn.Module:
    """The demo's transformer, 0.8M parameters."""
    return CharTransformer(outputs)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "convmixer": convmixer,
    "vgg": vgg,
    "resnext": resnext,
    "convnet": convnet,
    "gpt": gpt,
    "char-transformer": char_transformer,
}


def build(name: str, settings: dict[str, Any], shape: Shape, outputs: int) -> nn.Module:
    """A model, initialised from torch's global generator.

    Args:
        name: in `MODELS`.
        settings: the model's own, such as its depth.
        shape: of one input: [channels, height, width] of an image, [context] of a text.
        outputs: classes, or characters.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    try:
        return MODELS[name](shape, outputs, **settings)
    except TypeError as error:
        raise ValueError(f"model {name!r} does not take the settings {settings}: {error}") from None


def _convolution(into: int, out: int, kernel: int, **settings: int) -> list[nn.Module]:
    return [nn.Conv2d(into, out, kernel, bias=False, **settings), nn.BatchNorm2d(out)]


def _kaiming(network: nn.Module) -> None:
    """Initialises as the authors' VGG and ResNeXt do; torch's default is narrower."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
