"""Files: which are listed, which are read, and what is said about the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from random_adapters import close, random_adapter, unet_shapes


@pytest.fixture(scope="module")
def model(tiny_unet_model):
    return tiny_unet_model()


@pytest.fixture
def folders(pack, comfy_base) -> Iterator[dict[str, Path]]:
    """models/styleinject and models/loras, empty and known to ComfyUI, without the adapters that come with the pack."""
    import folder_paths

    found = {}
    for kind in ("styleinject", "loras"):
        folder = comfy_base / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        assert str(folder) in folder_paths.get_folder_paths(kind)
        found[kind] = folder
    registered = {name: folder_paths.folder_names_and_paths[name] for name in ("styleinject", "styleinject_demo")}
    folder_paths.folder_names_and_paths["styleinject"] = ([str(found["styleinject"])], {".safetensors"})
    folder_paths.folder_names_and_paths["styleinject_demo"] = ([], {".safetensors"})
    yield found
    folder_paths.folder_names_and_paths.update(registered)
    for folder in found.values():
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def listed(pack, folders):
    def names() -> list[str]:
        import folder_paths

        folder_paths.filename_list_cache.clear()
        return pack["StyleInjectLoader"].INPUT_TYPES()["required"]["adapter_name"][1]["options"]

    return names


def test_folder_is_registered_once_and_for_safetensors_only(pack, folders) -> None:
    import folder_paths

    paths = pack.submodule("integration.paths")
    elsewhere = str(folders["styleinject"] / "elsewhere")
    folder_paths.folder_names_and_paths["styleinject"] = ([elsewhere], set())  # as extra_model_paths.yaml does
    paths.register_folder()
    paths.register_folder()
    found, extensions = folder_paths.folder_names_and_paths["styleinject"]
    assert found == [elsewhere, str(folders["styleinject"])]
    assert extensions == {".safetensors"}
    assert folder_paths.folder_names_and_paths["styleinject_demo"] == ([str(paths.DEMO_ADAPTERS)], {".safetensors"})


def test_adapters_that_come_with_the_pack_fit_the_demo_model(pack, run_node) -> None:
    shipped = sorted(path.name for path in pack.submodule("integration.paths").DEMO_ADAPTERS.glob("*.safetensors"))
    assert shipped
    listed = pack["StyleInjectLoader"].INPUT_TYPES()["required"]["adapter_name"][1]["options"]
    assert [name for name in listed if name.startswith("demo/")] == [f"demo/{name}" for name in shipped]
    demo = run_node("StyleInjectDemoModel")[0]
    for name in shipped:
        adapter, _ = run_node("StyleInjectLoader", adapter_name=f"demo/{name}")
        _, report, *_ = run_node("StyleInjectApply", model=demo, adapter=adapter)
        assert f"{len(adapter.names)} of {len(adapter.names)} layers matched" in report


def test_adapters_and_loras_are_listed(folders, listed) -> None:
    (folders["styleinject"] / "sub").mkdir()
    for kind, name in (("styleinject", "a.safetensors"), ("styleinject", os.path.join("sub", "b.safetensors")),
                       ("styleinject", "notes.txt"), ("loras", "c.safetensors"), ("loras", "old.pt")):  # fmt: skip
        (folders[kind] / name).write_bytes(b"x")
    assert listed() == ["a.safetensors", "sub/b.safetensors", "loras/c.safetensors"]


def test_the_demos_adapters_come_last_and_are_never_a_new_nodes_choice(pack, folders, listed) -> None:
    import folder_paths

    paths, loader = pack.submodule("integration.paths"), pack["StyleInjectLoader"]
    folder_paths.folder_names_and_paths["styleinject_demo"] = ([str(paths.DEMO_ADAPTERS)], {".safetensors"})
    first, *others = listed()
    assert first == paths.NONE_CHOSEN and others and all(name.startswith("demo/") for name in others)
    assert "no adapter chosen" in loader.validate_inputs(adapter_name=first)
    (folders["loras"] / "c.safetensors").write_bytes(b"x")
    assert listed() == ["loras/c.safetensors", *others]


def test_workflows_of_the_first_versions_name_the_demos_adapters_without_a_folder(pack, folders, listed) -> None:
    import folder_paths

    paths, name = pack.submodule("integration.paths"), "emoji-noto.safetensors"
    folder_paths.folder_names_and_paths["styleinject_demo"] = ([str(paths.DEMO_ADAPTERS)], {".safetensors"})
    listed()
    assert paths.adapter_path(name) == paths.adapter_path(f"demo/{name}") == paths.DEMO_ADAPTERS / name
    (folders["styleinject"] / name).write_bytes(b"x")
    listed()
    assert paths.adapter_path(name) == folders["styleinject"] / name, "a file of the user's own comes first"


def test_load_apply_and_one_node_path_agree(pack, model, folders, listed, run_node, sample) -> None:
    core = pack.submodule("styleinject_core")
    made = random_adapter(pack, model)
    core.save_adapter(made, folders["styleinject"] / "ink.safetensors")
    assert listed() == ["ink.safetensors"]
    loaded, _ = run_node("StyleInjectLoader", adapter_name="ink.safetensors")
    assert loaded.name == "ink" and loaded.names == made.names
    expected = sample(run_node("StyleInjectApply", model=model, adapter=made, strength=0.5)[0])
    assert torch.equal(sample(run_node("StyleInjectApply", model=model, adapter=loaded, strength=0.5)[0]), expected)
    short, *_ = run_node("StyleInjectLoadAndApply", model=model, adapter_name="ink.safetensors", strength=0.5)
    assert torch.equal(sample(short), expected)


def test_lora_file_is_an_adapter_and_equals_the_native_lora(pack, model, folders, listed, run_node, sample) -> None:
    import comfy.sd
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in unet_shapes(pack, model).items():
        if name.endswith("attn2.to_v"):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, shape.in_features, generator=generator) * 0.2
            tensors[f"{key}.lora_up.weight"] = torch.randn(shape.out_features, 4, generator=generator) * 0.2
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, folders["loras"] / "plain.safetensors")
    native = sample(comfy.sd.load_lora_for_models(model, None, tensors, 0.7, 0)[0])
    assert listed() == ["loras/plain.safetensors"]
    ours, *_ = run_node("StyleInjectLoadAndApply", model=model, adapter_name="loras/plain.safetensors", strength=0.7)
    assert close(sample(ours), native)
    assert not close(native, sample(model), 0.01)


@pytest.mark.parametrize("name", ["../secret.safetensors", "sub/../../secret.safetensors", "..\\secret.safetensors",
                                  "/etc/secret.safetensors", "C:\\secret.safetensors", "loras/../../secret.safetensors"])  # fmt: skip
@pytest.mark.parametrize("node", ["StyleInjectLoader", "StyleInjectLoadAndApply"])
def test_names_stay_inside_their_folder(pack, folders, run_node, model, name, node) -> None:
    (folders["styleinject"].parent / "secret.safetensors").write_bytes(b"x")
    message = pack[node].validate_inputs(adapter_name=name)
    assert name in str(message).replace("\\\\", "\\") and "not a path that leads out of it" in message
    with pytest.raises(ValueError, match="leads out of it"):
        run_node(node, adapter_name=name, **({} if node == "StyleInjectLoader" else {"model": model}))
    (folders["styleinject"].parent / "secret.safetensors").unlink()


def test_missing_file_names_the_folders_and_what_is_there(pack, folders, listed, run_node) -> None:
    loader = pack["StyleInjectLoader"]
    assert listed() == ["choose an adapter"]
    assert "there are no adapters yet" in loader.validate_inputs(adapter_name="ink.safetensors")
    (folders["loras"] / "other.safetensors").write_bytes(b"x")
    assert listed() == ["loras/other.safetensors"]
    message = loader.validate_inputs(adapter_name="ink.safetensors")
    for part in ("'ink.safetensors' not found", str(folders["styleinject"]), str(folders["loras"]), "loras/other.safetensors"):
        assert part in message
    with pytest.raises(FileNotFoundError, match="not found"):
        run_node("StyleInjectLoader", adapter_name="ink.safetensors")
    assert loader.validate_inputs(adapter_name="loras\\other.safetensors") is True, "a workflow from Windows"


def test_changed_file_is_loaded_again(pack, model, folders, listed) -> None:
    core = pack.submodule("styleinject_core")
    path = folders["styleinject"] / "ink.safetensors"
    for node in ("StyleInjectLoader", "StyleInjectLoadAndApply"):
        seen = [pack[node].fingerprint_inputs(adapter_name="ink.safetensors")]
        for rank in (2, 3):
            core.save_adapter(random_adapter(pack, model, r=rank), path)
            listed()
            seen.append(pack[node].fingerprint_inputs(adapter_name="ink.safetensors"))
        assert len(set(seen)) == 3
        assert seen[-1] == pack[node].fingerprint_inputs(adapter_name="ink.safetensors")
        path.unlink()
        listed()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", b"\x10\x00\x00\x00\x00\x00\x00\x00{"])
def test_files_that_are_no_adapters(pack, folders, listed, run_node, content) -> None:
    (folders["styleinject"] / "bad.safetensors").write_bytes(content)
    assert listed() == ["bad.safetensors"]
    with pytest.raises(pack.submodule("styleinject_core").AdapterFileError, match="bad.safetensors"):
        run_node("StyleInjectLoader", adapter_name="bad.safetensors")


def test_info_shows_what_an_adapter_is(pack, model) -> None:
    adapter = random_adapter(pack, model, name="ink")
    output = pack["StyleInjectInfo"].execute(adapter=adapter)
    (text,) = output.result
    assert text.startswith("ink: StyleInject for")
    assert f"{adapter.parameter_count():,}" in text
    assert output.ui.as_dict()["text"] == (text,)
