"""The one writer of files: whole or not at all, with the user's permissions, through no link, and used by everything."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from styleinject_core.files.atomic import WriteError, replacing, save_tensors

ROOT = Path(__file__).parents[2]
WRITER = "styleinject_core/files/atomic.py"
POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")


def test_a_file_appears_whole_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == tmp_path
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no picture")])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("former")
    expected = WriteError if isinstance(error, OSError) else type(error)

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of it")
            raise error

    with pytest.raises(expected) as caught:
        write()
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]
    if expected is WriteError:
        assert str(caught.value).startswith(f"a.txt: could not be written to {tmp_path}: ")
        assert "No space left" in str(caught.value) and caught.value.__cause__ is error


def test_a_folder_that_is_not_there(tmp_path):
    with (
        pytest.raises(WriteError, match=r"a\.txt: could not be written to .*nowhere"),
        replacing(tmp_path / "nowhere" / "a.txt"),
    ):
        pytest.fail("there is nothing to write to")


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(WriteError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@POSIX
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_what_the_umask_leaves(tmp_path, mask, mode):
    former = os.umask(mask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(former)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(2))


@POSIX
def test_links_are_replaced_and_never_written_through(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.txt").symlink_to(tmp_path / "precious")
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda count: "guessed")
    (tmp_path / ".guessed.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(WriteError, match="File exists"), replacing(tmp_path / "a.txt"):
        pytest.fail("it opened a link that was there before")
    assert (tmp_path / "precious").read_text() == "precious"


def test_temporary_names_differ(tmp_path):
    names = set()
    for _ in range(5):
        with replacing(tmp_path / "a.txt") as temporary:
            names.add(temporary.name)
    assert len(names) == 5


def _writers(path: Path) -> list[str]:
    """Calls that write a file by themselves: (path of the pack, what they call), but for those into a `replacing` block."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(call)
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and any("replacing(" in ast.unparse(item.context_expr) for item in block.items)
        for call in ast.walk(block)
        if isinstance(call, ast.Call)
    }
    found = []
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and id(call) not in inside:
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            whole = ast.unparse(call.func)
            if name in {"save_file", "write_text", "write_bytes", "savefig", "imsave", "mkstemp", "NamedTemporaryFile"} or whole in {
                "os.replace", "os.rename", "torch.save",
            }:  # fmt: skip
                found.append(f"{path.relative_to(ROOT).as_posix()}: {whole}")
    return found


def test_everything_is_written_by_the_writer():
    files = [p for folder in ("styleinject_core", "integration", "nodes", "scripts") for p in (ROOT / folder).rglob("*.py")]
    found = [writer for path in sorted(files) if path.relative_to(ROOT).as_posix() != WRITER for writer in _writers(path)]
    assert found == ["scripts/demo/build_data.py: (args.out / 'concepts.json').write_text"]  # makes the pack's own assets
