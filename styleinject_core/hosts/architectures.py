"""The layers of the Stable Diffusion U-Nets, from the architecture alone: no weights and no diffusers needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..adapter import Adapter
from ..layers import LayerShape
from ..methods import AdapterLayer


@dataclass(frozen=True)
class UNetArchitecture:
    """A conditional U-Net of the Stable Diffusion family, by diffusers' terms.

    Args:
        title: for people; `modelspec`: the ModelSpec 1.0 architecture id.
        channels: output channels per level.
        transformer_depth: transformer blocks per attention, one entry per level; 0 for a level without attention.
        context: width of the text conditioning (input of attn2's to_k and to_v).
        linear_projection: whether proj_in and proj_out are Linear (SD 2, SDXL) rather than 1x1 convolutions.
        added_features: input of add_embedding.linear_1 (SDXL), or None.
    """

    title: str
    modelspec: str
    channels: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    context: int
    linear_projection: bool = False
    added_features: int | None = None
    layers_per_block: int = 2
    latent_channels: int = 4

    def shapes(self) -> dict[str, LayerShape]:
        """Every Linear and Conv2d of the U-Net: diffusers name -> LayerShape."""
        return dict(self._layers())

    def _layers(self) -> Iterator[tuple[str, LayerShape]]:
        first, last = self.channels[0], self.channels[-1]
        time = 4 * first
        yield "conv_in", LayerShape(self.latent_channels, first, (3, 3))
        yield "time_embedding.linear_1", LayerShape(first, time)
        yield "time_embedding.linear_2", LayerShape(time, time)
        if self.added_features is not None:
            yield "add_embedding.linear_1", LayerShape(self.added_features, time)
            yield "add_embedding.linear_2", LayerShape(time, time)
        skips = [first]
        current = first
        levels = range(len(self.channels))
        for level in levels:
            out, depth = self.channels[level], self.transformer_depth[level]
            for index in range(self.layers_per_block):
                yield from self._resnet(f"down_blocks.{level}.resnets.{index}", current, out)
                current = out
                if depth:
                    yield from self._transformer(f"down_blocks.{level}.attentions.{index}", out, depth)
                skips.append(current)
            if level != levels[-1]:
                yield f"down_blocks.{level}.downsamplers.0.conv", LayerShape(out, out, (3, 3))
                skips.append(current)
        yield from self._resnet("mid_block.resnets.0", last, last)
        yield from self._transformer("mid_block.attentions.0", last, self.transformer_depth[-1] or 1)
        yield from self._resnet("mid_block.resnets.1", last, last)
        for up, level in enumerate(reversed(levels)):
            out, depth = self.channels[level], self.transformer_depth[level]
            for index in range(self.layers_per_block + 1):
                yield from self._resnet(f"up_blocks.{up}.resnets.{index}", current + skips.pop(), out)
                current = out
                if depth:
                    yield from self._transformer(f"up_blocks.{up}.attentions.{index}", out, depth)
            if level != 0:
                yield f"up_blocks.{up}.upsamplers.0.conv", LayerShape(out, out, (3, 3))
        yield "conv_out", LayerShape(first, self.latent_channels, (3, 3))

    def _resnet(self, name: str, inputs: int, out: int) -> Iterator[tuple[str, LayerShape]]:
        yield f"{name}.conv1", LayerShape(inputs, out, (3, 3))
        yield f"{name}.time_emb_proj", LayerShape(4 * self.channels[0], out)
        yield f"{name}.conv2", LayerShape(out, out, (3, 3))
        if inputs != out:
            yield f"{name}.conv_shortcut", LayerShape(inputs, out, (1, 1))

    def _transformer(self, name: str, width: int, depth: int) -> Iterator[tuple[str, LayerShape]]:
        projection = LayerShape(width, width, None if self.linear_projection else (1, 1))
        yield f"{name}.proj_in", projection
        for k in range(depth):
            block = f"{name}.transformer_blocks.{k}"
            for attention, source in (("attn1", width), ("attn2", self.context)):
                yield f"{block}.{attention}.to_q", LayerShape(width, width)
                yield f"{block}.{attention}.to_k", LayerShape(source, width)
                yield f"{block}.{attention}.to_v", LayerShape(source, width)
                yield f"{block}.{attention}.to_out.0", LayerShape(width, width)
            yield f"{block}.ff.net.0.proj", LayerShape(width, 8 * width)
            yield f"{block}.ff.net.2", LayerShape(4 * width, width)
        yield f"{name}.proj_out", projection


ARCHITECTURES = {
    "sd15": UNetArchitecture("Stable Diffusion 1.x", "stable-diffusion-v1", (320, 640, 1280, 1280), (1, 1, 1, 0), 768),
    "sd21": UNetArchitecture(
        "Stable Diffusion 2.x", "stable-diffusion-v2-512", (320, 640, 1280, 1280), (1, 1, 1, 0), 1024, linear_projection=True
    ),
    "sdxl": UNetArchitecture(
        "Stable Diffusion XL", "stable-diffusion-xl-v1-base", (320, 640, 1280), (0, 2, 10), 2048, True, 2816
    ),
    "demo": UNetArchitecture(
        "StyleInject demo", "styleinject-demo", (96, 192), (1, 1), 128, layers_per_block=1, latent_channels=16
    ),
}  # fmt: skip


def architecture_of(adapter: Adapter) -> UNetArchitecture | None:
    """The architecture an adapter was made for: what its metadata says, else the one all of whose layers fit it."""
    stated = adapter.metadata.get("modelspec.architecture", "").split("/")[0]
    for architecture in ARCHITECTURES.values():
        if architecture.modelspec == stated:
            return architecture
    for architecture in ARCHITECTURES.values():
        shapes = architecture.shapes()
        layers = adapter.layers
        if any(name in shapes for name in layers) and all(_is_of(shapes.get(name), layer) for name, layer in layers.items()):
            return architecture
    return None


def title_of(modelspec: str) -> str:
    """The title of an architecture by its ModelSpec id; the id itself where it is none of these."""
    return next((a.title for a in ARCHITECTURES.values() if a.modelspec == modelspec), modelspec)


def _is_of(shape: LayerShape | None, layer: AdapterLayer) -> bool:
    """Whether an adapter's layer is for a host layer of that shape; norms and the like are in no list of shapes."""
    return bool(layer.shape.other) if shape is None else layer.on(shape) is not None


def describe(adapter: Adapter) -> str:
    """What an adapter was made for, in words: the title of a known architecture, or what its metadata says."""
    architecture = architecture_of(adapter)
    if architecture is not None:
        return architecture.title
    stated = adapter.metadata.get("styleinject.base") or adapter.metadata.get("modelspec.architecture", "").partition("/")[0]
    return stated or f"an unknown architecture (first layer: {adapter.names[0]})"
