"""Who may import whom: docs/decisions/0001-two-packages.md, held by reading every import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "styleinject_core"
HOST_PROGRAM = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution", "nodes"}
OPTIONAL = {
    "diffusers": {"demo/model.py", "train/pipeline.py"},
    "matplotlib": {"demo/pictures.py", "train/watch.py", "router/canvas.py"},
    "tqdm": {"demo/run.py", "train/watch.py", "commands/build.py"},
    "PIL": {"demo/data.py", "commands/run.py", "train/images.py"},
    "numpy": {"demo/data.py", "train/images.py"},
    "peft": set(),
    "accelerate": {"train/parallel.py"},
    "sklearn": {"router/embedding.py"},
    "umap": {"router/embedding.py"},
    "transformers": set(),
    "bitsandbytes": {"train/optimizers.py"},
    "schedulefree": {"train/optimizers.py"},
    "prodigyopt": {"train/optimizers.py"},
}
# Each part sees itself and what stands before it.
ORDER = ["config", "layers", "selector", "adapter", "functional", "override", "attach", "files", "hosts", "summary",
         "router", "train", "demo", "commands", "cli"]  # fmt: skip
FUNCTIONAL_SEES = {"layers", "functional"}
PICTURES = {"analysis.py", "embedding.py", "canvas.py", "plots.py"}  # of the router: they see traces and nothing else


def imports(path: Path):
    """(module, level of relative import, at module level?) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            if node.level and not node.module:
                for alias in node.names:
                    yield alias.name, node.level, id(node) in top
            else:
                yield node.module or "", node.level, id(node) in top


def files(folder: Path):
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("path", files(CORE), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_core_knows_no_host_program_and_keeps_its_order(path):
    relative = path.relative_to(CORE)
    part = relative.parts[0].removesuffix(".py")
    for module, level, at_top in imports(path):
        name = module.split(".")[0]
        if level == 0:
            assert name not in HOST_PROGRAM, f"{relative} imports {module}"
            assert name != "styleinject_core", f"{relative}: imports inside the pack are relative"
            if name in OPTIONAL:
                assert relative.as_posix() in OPTIONAL[name], f"{relative} imports {module}"
                assert not at_top, f"{relative}: {module} is optional, import it where it is used"
        elif part != "__init__":
            inside = level < len(relative.parts)  # from .x in a subfolder
            target = part if inside else name
            assert ORDER.index(target) <= ORDER.index(part), f"{relative} imports {target}, which comes later"
            if part == "functional":
                assert target in FUNCTIONAL_SEES, f"{relative} imports {target}"
            if part == "router" and path.name in PICTURES:
                assert inside and f"{name}.py" in {"trace.py", *PICTURES}, f"{relative} imports {module}"


@pytest.mark.parametrize("path", files(ROOT / "nodes"), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nodes_import_relatively_and_only_patcher_touches_modelpatcher(path):
    for module, level, _ in imports(path):
        assert level > 0 or not module.startswith("styleinject_core"), f"{path.name}: import the core relatively"
        assert module != "comfy.model_patcher" or path.name == "patcher.py", f"{path.name} touches ModelPatcher"


def test_the_root_module_imports_nothing_at_load():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.level]
    assert "NODE_CLASS_MAPPINGS" not in (ROOT / "__init__.py").read_text(encoding="utf-8")
