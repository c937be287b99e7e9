"""Who may import whom: docs/decisions/0001-two-packages.md, 0011-floors.md, held by reading every import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "styleinject_core"
# The packages of the pack; each sees itself and what stands before it.
FLOORS = ["styleinject_core", "integration", "nodes"]
# Within a package, its parts likewise: modules, or sub-packages.
ORDER = {
    "styleinject_core": ["layers", "config", "functional", "methods", "layer_vocabulary", "layer_names", "selector", "adapter",
                         "call", "site", "plan", "override", "attach", "files", "hosts", "colors", "router", "summary", "deadiff", "train", "demo",
                         "commands", "cli"],
    "styleinject_core/train": ["settings", "request", "parallel", "random_numbers", "data", "models", "activations", "memory", "objectives", "run"],
    "integration": ["paths", "live", "style_names", "places", "tokens", "injection", "monitor", "guidance", "reference", "taking_part", "sampling_run", "sampling", "weight_patches", "patcher", "saving",
                    "reference_encoder", "text_encoder", "demo_model", "training"],
    "integration/training": ["pictures", "graph_inputs", "comfy_model", "graph_model", "named_runs", "train_options", "drawing", "job", "trainings"],
    "nodes": ["schema", "adapter", "reference", "router", "train", "demo"],
}  # fmt: skip
HOST_PROGRAM = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution", "nodes"}
OPTIONAL = {  # packages that need not be there, and the files of the core that import them, inside a function
    "diffusers": {"demo/model.py", "train/models/pipeline.py"},
    "matplotlib": {"demo/pictures.py", "train/run/watch.py", "router/canvas.py"},
    "tqdm": {"demo/show.py", "train/run/watch.py", "commands/build.py"},
    "PIL": {"deadiff/cards.py", "demo/data.py", "demo/references.py", "train/data/images.py", "train/run/watch.py"},
    "numpy": {"deadiff/cards.py", "demo/data.py", "demo/references.py", "train/data/images.py"},
    "peft": set(),
    "accelerate": {"train/parallel.py"},
    "sklearn": {"router/embedding.py"},
    "umap": {"router/embedding.py"},
    "transformers": set(),
    "bitsandbytes": {"train/run/optimizers.py"},
    "schedulefree": {"train/run/optimizers.py"},
    "prodigyopt": {"train/run/optimizers.py"},
}
COMMAND_LINE = {("styleinject_core", "commands"), ("styleinject_core", "cli")}  # of the core; ComfyUI has its own ways in
FUNCTIONAL_SEES = {"layers", "functional"}
PICTURES = {"analysis", "embedding", "canvas", "plots"}  # of the router: they see traces, names, colors and how to write a file
# Attributes and arguments of __init__ that are `Any`, and what they are. Only what belongs to other programs may be, or
# what torch types too narrowly: `Any` for a type of this pack would hide an import that the rules above forbid.
FOREIGN = {
    "styleinject_core/adapter.py Adapter._layers": "a ModuleList, whose items torch types as Module",
    "styleinject_core/commands/training.py _Watch.board": "tensorboard's SummaryWriter",
    "styleinject_core/functional/host.py HostLayer.module": "a Module, whose attributes torch types as Tensor or Module",
    "styleinject_core/override.py Override.module": "a Module, whose attributes torch types as Tensor or Module",
    "styleinject_core/train/models/pipeline.py PipelineModel.pipeline": "diffusers' pipeline",
    "styleinject_core/train/data/batches.py Given.value": "what a host program gives its model: tensors, numbers, texts, lists",
    "styleinject_core/train/run/watch.py ProgressBar.bar": "tqdm's",
    "integration/sampling_run.py Run.guider": "ComfyUI's CFGGuider, or what a custom node has in its place",
    "integration/training/comfy_model.py ComfySchedule.sampling": "ComfyUI's ModelSampling",
    "integration/training/named_runs.py Watch._bar": "ComfyUI's ProgressBar",
    "integration/training/train_options.py TrainOptions.vae": "ComfyUI's VAE, or what has its decode",
}


def files(package: str) -> list[Path]:
    return sorted(p for p in (ROOT / package).rglob("*.py") if "__pycache__" not in p.parts)


EVERY_FILE = [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for package in FLOORS for path in files(package)]


def imports(path: Path) -> Iterator[tuple[tuple[str, ...], int, bool]]:
    """(module from the pack's root or of another package, level of the relative import, at module level?) of every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    folder = path.relative_to(ROOT).parts[:-1]
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split(".")), 0, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(folder) + 1, f"{path} imports from outside of the pack"
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            if (ROOT.joinpath(*module)).is_dir() and node.level:
                for alias in node.names:  # of a package: its modules, or names in its __init__
                    yield (*module, alias.name), node.level, id(node) in top
            else:
                yield module, node.level, id(node) in top


def exists(module: tuple[str, ...]) -> bool:
    """Whether there is such a module of the pack, or, in a package, such a name: mypy says nothing of what is missing."""
    target = ROOT.joinpath(*module)
    if target.is_dir() or target.with_suffix(".py").exists():
        return True
    package = target.parent / "__init__.py"
    return package.exists() and re.search(rf"\b{module[-1]}\b", package.read_text(encoding="utf-8")) is not None


@pytest.mark.parametrize("path", EVERY_FILE)
def test_every_package_and_part_sees_only_what_stands_before_it(path):
    own = path.relative_to(ROOT).with_suffix("").parts
    if path.name == "__init__.py":
        own = own[:-1]
    for module, level, _ in imports(path):
        name = ".".join(module)
        if not level:
            assert module[0] not in {"styleinject_core", "integration"}, f"{path}: imports inside the pack are relative: {name}"
            continue
        assert exists(module), f"{path} imports {name}, which is not there"
        assert FLOORS.index(module[0]) <= FLOORS.index(own[0]), f"{path} imports {name}, which is of a higher floor"
        for depth in range(1, min(len(own), len(module))):
            folder = "/".join(own[:depth])
            if module[:depth] != own[:depth] or folder not in ORDER:
                break
            order, part, target = ORDER[folder], own[depth], module[depth]
            if (ROOT / folder / f"{target}.py").exists() or (ROOT / folder / target).is_dir():  # else a name of __init__
                assert order.index(target) <= order.index(part), f"{path} imports {name}, which comes later"


@pytest.mark.parametrize("folder", ORDER)
def test_the_order_is_of_what_there_is(folder):
    there = {p.stem for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    assert there == set(ORDER[folder])


@pytest.mark.parametrize("path", [param for param in EVERY_FILE if param.id.startswith("styleinject_core/")])
def test_the_core_knows_no_host_program_and_imports_optional_packages_where_they_are_used(path):
    relative = path.relative_to(CORE)
    for module, level, at_top in imports(path):
        name = module[0]
        if not level:
            assert name not in HOST_PROGRAM, f"{relative} imports {name}"
            if name in OPTIONAL:
                assert relative.as_posix() in OPTIONAL[name], f"{relative} imports {name}"
                assert not at_top, f"{relative}: {name} is optional, import it where it is used"
        elif relative.parts[0] == "functional":
            assert module[1] in FUNCTIONAL_SEES, f"{relative} imports {'.'.join(module)}"
        elif relative.parts[0] == "router" and path.stem in PICTURES:
            seen = {"colors", "files.atomic", "layer_names", *(f"router.{name}" for name in ("trace", *PICTURES))}
            assert ".".join(module[1:]) in seen, f"{relative} imports {'.'.join(module)}"


@pytest.mark.parametrize("path", [param for param in EVERY_FILE if not param.id.startswith("styleinject_core/")])
def test_only_the_patcher_touches_modelpatcher_and_only_nodes_have_schemas(path):
    relative = path.relative_to(ROOT).as_posix()
    for module, _, _ in imports(path):
        assert module[:2] not in COMMAND_LINE, f"{relative} imports the command line's {'.'.join(module)}"
        assert module[:2] != ("comfy", "model_patcher") or relative == "integration/patcher.py", f"{relative}: ModelPatcher"
        assert module[0] != "comfy_api" or relative.startswith("nodes/"), f"{relative}: schemas are the nodes'"


@pytest.mark.parametrize("path", [param for param in EVERY_FILE if param.id.startswith("nodes/")])
def test_a_file_of_nodes_has_nodes(path):
    if path.name in {"__init__.py", "schema.py"}:
        return
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    assert classes, f"{path} has no node"
    for node in classes:
        assert [ast.unparse(base) for base in node.bases] == ["io.ComfyNode"], f"{path}: {node.name} is no node"


def untyped_links(path: Path) -> Iterator[str]:
    """The fields and attributes of a file's classes, and the arguments they are made of, whose annotation is `Any`."""
    for cls in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(cls, ast.ClassDef):
            continue
        for node in ast.walk(cls):
            if isinstance(node, ast.AnnAssign) and (node in cls.body or isinstance(node.target, ast.Attribute)):
                annotated = [(ast.unparse(node.target).removeprefix("self."), node.annotation)]
            elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                annotated = [(a.arg, a.annotation) for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            else:
                continue
            for name, annotation in annotated:
                if annotation is not None and ast.unparse(annotation) in {"Any", "Any | None", "object", "object | None"}:
                    yield f"{path.relative_to(ROOT).as_posix()} {cls.name}.{name}"


def test_no_untyped_link_hides_a_type_of_a_higher_floor():
    links = {link for package in ("styleinject_core", "integration") for path in files(package) for link in untyped_links(path)}
    assert links == FOREIGN.keys()


def test_the_root_module_imports_nothing_at_load():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert not [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.level]
    assert "NODE_CLASS_MAPPINGS" not in (ROOT / "__init__.py").read_text(encoding="utf-8")
