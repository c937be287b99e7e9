"""ComfyUI-StyleInject: StyleInject adapters (arXiv 2401.13942) for ComfyUI.

This file is ComfyUI's entry point and nothing else: the nodes are in `nodes/`, the method in `styleinject_core`, which
works without ComfyUI. Everything is imported inside the function, because test runners import this file by itself.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes."""
    from .nodes import StyleInjectExtension

    return StyleInjectExtension()
