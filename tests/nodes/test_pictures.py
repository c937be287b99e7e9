"""Folders of pictures as training data: what is read, how it is turned, and what is said about the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms


@pytest.fixture
def folder(pack) -> Iterator[Path]:
    """An empty folder "mine" in ComfyUI's input folder."""
    import shutil

    import folder_paths

    made = Path(folder_paths.get_input_directory()) / "mine"
    made.mkdir(parents=True)
    yield made
    shutil.rmtree(made)


def pictures(run_node, **given):
    """(images, captions, trigger, styles) of the node."""
    values = {"folder": "mine", "captions": "from files", "caption": "", "trigger": "", "size": 64, "keep_shape": True}
    return run_node("StyleInjectPictures", **(values | given))


def test_pictures_and_captions_go_together(folder, run_node) -> None:
    for name, color in (("b.v2.final", "red"), ("a", "blue")):
        Image.new("RGB", (100, 100), color).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {color}\nthing\n", encoding="utf-8")
    images, captions, trigger, styles = pictures(run_node, trigger=" zwx ")
    assert captions == ["zwx, a blue thing", "zwx, a red thing"], "in the order of the names, dots in them or not"
    assert [image.shape for image in images] == [(1, 64, 64, 3)] * 2
    assert images[0][0, 5, 5].tolist() == [0, 0, 1] and images[1][0, 5, 5].tolist() == [1, 0, 0]
    assert trigger == "zwx" and styles == ["", ""]


def test_folders_inside_it_can_be_a_style_each(folder, run_node) -> None:
    """A folder's name, as words, is put before its captions, and goes to the training node; deeper folders belong to it."""
    for name in ("none.png", "ink/a.png", "water_color/b.png", "water_color/more/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(folder / name)
    said = {"captions": "one caption for all", "caption": "an Ink drawing", "subfolders": "a style each", "trigger": "zwx"}
    images, captions, _, styles = pictures(run_node, **said)
    assert len(images) == 4 and dict(zip(styles, captions, strict=True)) == {
        "": "zwx, an Ink drawing",
        "ink": "zwx, an Ink drawing",  # it says so already
        "water color": "zwx, water color, an Ink drawing",
    }
    assert sorted(styles) == ["", "ink", "water color", "water color"]
    *_, ignored = pictures(run_node, **{**said, "subfolders": "more pictures"})
    assert ignored == [""] * 4
    for broken, message in (
        ("water_color", "pictures are in 1 folders inside it"),
        ("ink", "pictures are in 0 folders inside"),
    ):
        for path in (folder / broken).rglob("*.png"):
            path.unlink()
        with pytest.raises(ValueError, match=message):
            pictures(run_node, **said)
    with pytest.raises(ValueError, match="subfolders: connected images are in no folders"):
        pictures(run_node, **said, images=torch.zeros(1, 64, 64, 3))


def test_upright_on_white_and_in_srgb(folder, run_node) -> None:
    turned = Image.new("RGB", (128, 128), "white")
    turned.paste("red", (0, 0, 128, 64))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the upper half is the right one
    turned.save(folder / "1.jpg", exif=exif, quality=100, subsampling=0)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(folder / "2.png")
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))  # a profile that cannot be the picture's
    Image.new("RGB", (64, 64), (10, 200, 30)).save(folder / "3.png", icc_profile=swapped.tobytes())
    images, captions, *_ = pictures(run_node, captions="one caption for all", caption="a thing")
    assert captions == ["a thing"] * 3
    right, left = images[0][0, 32, 60], images[0][0, 32, 4]
    assert right[1] < 0.1 and left[1] > 0.9, "the photo is upright"
    assert (images[1] == 1).all(), "nothing is white, not black"
    torch.testing.assert_close(images[2][0, 0, 0], torch.tensor([10, 200, 30]) / 255, rtol=0, atol=1e-6)


def test_wide_pictures_stay_wide_or_are_cut(folder, run_node) -> None:
    Image.new("RGB", (600, 300), "red").save(folder / "wide.png")
    one = {"captions": "trigger word alone", "trigger": "zwx", "size": 512}
    (kept,), captions, *_ = pictures(run_node, **one)
    (cut,), *_ = pictures(run_node, **one, keep_shape=False)
    assert kept.shape[2] > kept.shape[1] and kept.shape[1] % 64 == kept.shape[2] % 64 == 0
    assert cut.shape == (1, 512, 512, 3) and captions == ["zwx"]


def test_a_broken_picture_is_left_out_and_named(pack, folder, run_node) -> None:
    module = pack.submodule("integration.training.pictures")
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"{number}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    (folder / "2b.png").write_bytes(b"no picture")
    found = module.from_folder("mine", 64, True, "one caption for all", "a thing", "")
    assert [round(image[0, 0, 0, 0].item() * 255) for image in found.images] == [0, 2]
    assert "2 pictures: 2 of 64x64" in found.report
    assert "left out: 1.png: cannot be decoded" in found.report and "left out: 2b.png: cannot be decoded" in found.report


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, {}, "no images; looked for .png"),
        ({"a.png": None}, {}, r"1 of 1 images have no caption \(a.png\).*one caption for all"),
        ({"a.png": None}, {"captions": "one caption for all"}, "caption is empty"),
        ({"a.png": None}, {"captions": "trigger word alone"}, "trigger is empty"),
        ({"a.png": None}, {"size": 100}, "expected a multiple of the bucket step 64, found 100"),
        ({"a.png": b"x"}, {"captions": "trigger word alone", "trigger": "zwx"}, "none of the 1 images can be read"),
    ],
)
def test_what_cannot_be_trained_on_is_said(folder, run_node, files, given, message) -> None:
    for name, content in files.items():
        if content is None:
            Image.new("RGB", (64, 64)).save(folder / name)
        else:
            (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        pictures(run_node, **given)


@pytest.mark.parametrize("name", ["../secret", "mine/../../secret", "..\\secret", "/etc", "C:\\pictures", "", "."])
def test_folders_stay_inside_the_input_folder(pack, folder, run_node, name) -> None:
    assert "a path that leads out of it" in pack["StyleInjectPictures"].validate_inputs(folder=name)
    with pytest.raises(ValueError, match="leads out of it"):
        pictures(run_node, folder=name)


def test_links_do_not_lead_out_either(pack, folder, tmp_path) -> None:
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    assert "leads out of it" in pack["StyleInjectPictures"].validate_inputs(folder="mine/link")


def test_folders_are_listed_and_a_missing_one_is_named(pack, folder) -> None:
    node = pack["StyleInjectPictures"]

    def names() -> list[str]:
        return node.INPUT_TYPES()["required"]["folder"][1]["options"]

    assert "mine" not in names() and "samples/line art" in names()
    (folder / "sub").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "sub" / "a.png")
    assert names()[0] == "mine/sub", "the user's own come first"
    message = node.validate_inputs(folder="gone")
    assert "'gone' not found" in message and "mine/sub" in message
    assert node.validate_inputs(folder="mine\\sub") is True, "a workflow from Windows"


def test_a_changed_folder_is_read_again(pack, folder) -> None:
    node = pack["StyleInjectPictures"]
    seen = [node.fingerprint_inputs(folder="mine")]
    for name in ("a.png", "b.txt"):
        (folder / name).write_bytes(b"x")
        seen.append(node.fingerprint_inputs(folder="mine", size=64))
    assert len(set(seen)) == 3 and seen[-1] == node.fingerprint_inputs(folder="mine")


def test_an_edit_that_keeps_size_and_date_is_read_again(pack, folder) -> None:
    import os
    import time

    node, file = pack["StyleInjectPictures"], folder / "a.txt"
    file.write_text("a cat")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    date, before = file.stat().st_mtime_ns, node.fingerprint_inputs(folder="mine")
    time.sleep(0.02)
    file.write_text("a dog")
    os.utime(file, ns=(date, date))
    assert before and node.fingerprint_inputs(folder="mine") != before


def test_a_change_in_a_linked_subfolder_is_seen(pack, folder, tmp_path) -> None:
    """Its pictures are read with the others."""
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "round").symlink_to(folder, target_is_directory=True)
    node = pack["StyleInjectPictures"]
    before = node.fingerprint_inputs(folder="mine")
    (tmp_path / "b.txt").write_text("x")
    assert before and node.fingerprint_inputs(folder="mine") != before


def test_connected_images_take_the_folders_place(run_node) -> None:
    batch = torch.zeros(2, 80, 80, 4)
    batch[1] = 1
    images, captions, *_ = pictures(
        run_node, folder="samples/one cat", images=batch, captions="one caption for all", caption="a thing", trigger="zwx"
    )
    assert captions == ["zwx, a thing"] * 2
    assert [image.shape for image in images] == [(1, 64, 64, 3)] * 2 and (images[0] == 1).all(), "transparent is white"
    with pytest.raises(ValueError, match="connected images have no files"):
        pictures(run_node, folder="samples/one cat", images=batch)


def test_prompts_by_line(run_node) -> None:
    assert run_node("StyleInjectPrompts", text=" a cat \n\n a dog", before="zwx ") == (
        ["zwx, a cat", "zwx, a dog"],
        ["a cat", "a dog"],
    )
    assert run_node("StyleInjectPrompts", text="a cat", before="")[0] == ["a cat"]
    with pytest.raises(ValueError, match="no prompts"):
        run_node("StyleInjectPrompts", text="\n ", before="zwx")


def test_the_samples_train_the_demo_model_and_the_word_is_saved(pack, run_node, trained_folder) -> None:
    """The whole way: samples, the demo model's CLIP and VAE, a training, and the loaders' trigger word."""
    import nodes

    model, vae, clip = run_node("StyleInjectDemoModel")
    images, captions, word, _ = pictures(run_node, folder="samples/line art", trigger="inkline7")
    assert len(images) == 40 and captions[0].startswith("inkline7, ")
    latents = [nodes.VAEEncode().encode(vae, image)[0] for image in images[:4]]
    conditioning = [nodes.CLIPTextEncode().encode(clip, text)[0] for text in captions[:4]]
    widgets = {"name": "samples", "method": "styleinject", "steps": 1, "learning_rate": 1e-3, "batch_size": 2, "rank": 2,
               "styles": 2, "layers": "to_q"}  # fmt: skip
    adapter, *_ = run_node(
        "StyleInjectTrain", model=[model], latents=latents, conditioning=conditioning, trigger=[word],
        **{name: [value] for name, value in widgets.items()},
    )  # fmt: skip
    assert adapter.metadata["modelspec.trigger_phrase"] == "inkline7"
    listed = next(
        name for name in pack["StyleInjectLoader"].INPUT_TYPES()["required"]["adapter_name"][1]["options"] if "samples" in name
    )
    assert run_node("StyleInjectLoader", adapter_name=listed)[1] == "inkline7"
    assert run_node("StyleInjectLoadAndApply", model=model, adapter_name=listed, strength=1.0)[1] == "inkline7"


def test_the_demos_clip_refuses_what_it_cannot_know(run_node) -> None:
    import nodes

    clip = run_node("StyleInjectDemoModel")[2]
    with pytest.raises(ValueError, match="knows none of these words: qwertz"):
        nodes.CLIPTextEncode().encode(clip, "qwertz")
    assert nodes.CLIPTextEncode().encode(clip, "")[0][0][0].shape == (1, 8, 128)
