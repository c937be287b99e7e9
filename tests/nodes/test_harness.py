"""The harness itself: ComfyUI is the real one, and the tiny model samples the same latent each time."""

from __future__ import annotations

from pathlib import Path

import comfyui
import torch
from pack_loader import load_pack


def test_comfyui_is_the_real_one(comfy_base: Path) -> None:
    import comfy.model_management
    import folder_paths

    import nodes

    root = comfyui.find_comfyui()
    assert Path(nodes.__file__).resolve() == root / "nodes.py"
    assert "KSampler" in nodes.NODE_CLASS_MAPPINGS
    assert Path(folder_paths.models_dir).resolve() == (comfy_base / "models").resolve()
    if comfyui.on_cpu():
        assert comfy.model_management.get_torch_device().type == "cpu"


def test_tiny_model_samples_deterministically(tiny_unet_model, sample, conditioning) -> None:
    first = sample(tiny_unet_model(seed=0), seed=5)
    assert first.shape == (1, 4, 8, 8)
    assert torch.isfinite(first).all()
    assert first.std() > 0.1
    model = tiny_unet_model(seed=0)
    assert torch.equal(sample(model, seed=5), first)
    assert torch.equal(sample(model.clone(), seed=5), first)
    assert not torch.allclose(sample(model, seed=6), first), "the seed is ignored"
    assert not torch.allclose(sample(model, seed=5, positive=conditioning(7)), first), "the prompt is ignored"
    assert not torch.allclose(sample(tiny_unet_model(seed=1), seed=5), first), "the weights are all alike"


def test_tiny_model_has_diffusers_names(tiny_unet_model) -> None:
    """Every layer that an adapter may want has a diffusers name, as in the full model."""
    import comfy.utils

    model = tiny_unet_model().model
    names = set(comfy.utils.unet_to_diffusers(model.model_config.unet_config).values())
    layers = {
        f"{name}.weight"
        for name, module in model.diffusion_model.named_modules()
        if hasattr(module, "in_features") or hasattr(module, "kernel_size")
    }
    assert layers and not layers - names


def test_pack_loads_under_a_path_like_name(tmp_path: Path) -> None:
    """A pack written for this test loads by location, with relative imports and its own folder ``nodes``."""
    folder = tmp_path / "some.pack"
    (folder / "nodes").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "async def comfy_entrypoint():\n    from .nodes import Extension\n    return Extension()\n", encoding="utf-8"
    )
    (folder / "nodes" / "__init__.py").write_text(
        "from comfy_api.latest import ComfyExtension, io\n"
        "class Echo(io.ComfyNode):\n"
        "    @classmethod\n"
        "    def define_schema(cls):\n"
        "        return io.Schema(node_id='HarnessEcho', category='test',\n"
        "                         inputs=[io.Int.Input('n', default=3)], outputs=[io.Int.Output()])\n"
        "    @classmethod\n"
        "    def execute(cls, n):\n"
        "        return io.NodeOutput(n)\n"
        "class Extension(ComfyExtension):\n"
        "    async def get_node_list(self):\n"
        "        return [Echo]\n",
        encoding="utf-8",
    )
    loaded = load_pack(folder)
    assert "." not in loaded.module.__name__
    assert loaded["HarnessEcho"].execute(n=4).result == (4,)
    assert loaded.submodule("nodes").__name__ == f"{loaded.module.__name__}.nodes"
