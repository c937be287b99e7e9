"""The names of an adapter's styles for the editor, before anything has run."""

from __future__ import annotations

import asyncio
from typing import Any

from ..styleinject_core import load_adapter
from ..styleinject_core.files import AdapterFileError
from .live import running_server
from .paths import adapter_path

ROUTE = "/styleinject/style_names"  # ?adapter=NAME, as the loaders list it; a JSON list


def style_names(name: str) -> list[str]:
    """The names of a listed adapter's styles; none where there is no such file, or no router in it."""
    try:
        adapter = load_adapter(adapter_path(name))
    except (AdapterFileError, OSError, ValueError):
        return []
    return list(adapter.style_names) if adapter.routed else []


def serve() -> None:
    """Add the route to ComfyUI's server, where one is being set up."""
    server = running_server()
    if server is None:
        return
    from aiohttp import web

    @server.routes.get(ROUTE)
    async def answer(request: Any) -> Any:
        return web.json_response(await asyncio.to_thread(style_names, request.query.get("adapter", "")))
