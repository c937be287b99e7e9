"""Training data from real files: folders, shards, buckets, and everything that can be wrong with them."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import unicodedata
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from styleinject_core.train.data import images
from styleinject_core.train.data.buckets import BatchOrder, bucket_sizes, nearest_bucket
from styleinject_core.train.data.folder import ImageFolder
from styleinject_core.train.data.images import CorruptError, DataError
from styleinject_core.train.data.kept import Kept, size_of
from styleinject_core.train.data.source import FolderSource
from styleinject_core.train.data.webdataset import ImageStream, find_shards

SMALL = {"resolution": 32, "bucket_step": 8}


def picture(width, height, seed=0):
    """Smooth colors, different for each seed, so that a crop or a turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), np.full_like(x, seed * 37 % 256)]
    return Image.fromarray(np.stack(rgb, -1).astype(np.uint8))


def png(width, height, seed=0):
    file = io.BytesIO()
    picture(width, height, seed).save(file, "PNG")
    return file.getvalue()


def truncated(data):
    """A file whose header is fine and whose pixels end early."""
    return data[: len(data) // 2]


SHAPES = [(50, 50), (90, 50), (50, 90), (64, 64), (33, 37), (120, 60), (20, 20), (48, 80), (100, 101), (70, 40)]


@pytest.fixture
def folder(tmp_path):
    """Ten captioned pictures of several shapes, one in a subfolder."""
    root = tmp_path / "data"
    (root / "more").mkdir(parents=True)
    for k, (width, height) in enumerate(SHAPES):
        place = root / "more" / f"p{k}.png" if k == 9 else root / f"p{k}.png"
        place.write_bytes(png(width, height, k))
        place.with_suffix(".txt").write_text(f"picture\n number {k} ", encoding="utf-8")
    return root


@pytest.fixture
def shards(tmp_path):
    """Three shards of 7, 8 and 9 samples; captions in text and in JSON."""
    root = tmp_path / "shards"
    root.mkdir()
    k = 0
    for shard, count in enumerate((7, 8, 9)):
        samples = {}
        for _ in range(count):
            width, height = SHAPES[k % len(SHAPES)]
            samples[f"s{k:03}.png"] = png(width, height, k)
            samples.update(
                {f"s{k:03}.txt": f"picture {k}".encode()}
                if k % 2
                else {f"s{k:03}.json": json.dumps({"caption": f"picture {k}", "width": width}).encode()}
            )
            k += 1
        write_tar(root / f"set-{shard:03}.tar", samples)
    return root


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# --- buckets


def test_bucket_sizes():
    assert bucket_sizes(512) == ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))
    assert bucket_sizes(512, 512, 1) == ((512, 512),)
    for h, w in bucket_sizes(1024, 64, 3):
        assert h % 64 == w % 64 == 0
        assert 0.85 * 1024**2 <= h * w <= 1024**2
        assert max(h, w) <= 3 * min(h, w)
    with pytest.raises(ValueError, match="expected a multiple of the bucket step 64, found 500"):
        bucket_sizes(500)
    with pytest.raises(ValueError, match=r"bucket_ratio: expected at least 1, found 0\.5"):
        bucket_sizes(512, 64, 0.5)


def test_nearest_bucket():
    sizes = bucket_sizes(512)
    assert nearest_bucket(sizes, 3000, 3000) == (512, 512)
    assert nearest_bucket(sizes, 4000, 3000) == (448, 576)
    assert nearest_bucket(sizes, 100, 3000) == (640, 384)


# --- order of batches

SIZES = [(8, 8)] * 21 + [(8, 16)] * 10 + [(16, 8)] * 2


def test_a_batch_has_one_size_and_every_example_comes_equally_often():
    order = BatchOrder(SIZES, batch_size=4, seed=3)
    seen = Counter()
    for step in range(order.steps(8)):
        batch = order.batch(step)
        assert len(batch) == 4
        assert len({SIZES[k] for k in batch}) == 1
        seen.update(batch)
    assert order.steps(8) == 8 * 33 // 4
    assert set(seen.values()) == {8}
    assert [order.epoch(order.steps(e)) for e in range(9)] == list(range(9))
    first = [k for step in range(order.steps(1)) for k in order.batch(step)]
    assert len(first) == 28  # 20 + 8: what is left over waits for the next epoch
    assert len(set(first)) == len(first)


def test_the_order_is_a_function_of_seed_and_step():
    order = BatchOrder(SIZES, 4, seed=3)
    straight = [order.batch(k) for k in range(60)]
    assert [BatchOrder(SIZES, 4, seed=3).batch(k) for k in reversed(range(60))] == straight[::-1]
    assert [BatchOrder(SIZES, 4, seed=4).batch(k) for k in range(60)] != straight
    assert straight[:8] != straight[8:16]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_n_processes_see_what_one_sees(world):
    alone = BatchOrder(SIZES, 12, seed=1)
    ranks = [BatchOrder(SIZES, 12 // world, seed=1, rank=r, world=world) for r in range(world)]
    for step in range(30):
        assert [k for r in ranks for k in r.batch(step)] == alone.batch(step)


def test_fewer_examples_than_a_batch():
    order = BatchOrder([(8, 8), (8, 16), (8, 8)], batch_size=8, seed=0)
    seen = Counter(k for step in range(order.steps(16)) for k in order.batch(step))
    assert set(seen.values()) == {16}
    assert order.epoch(0) == 3  # four epochs of two fill the first batch


def test_advice_about_many_sizes():
    many = [(8, k) for k in range(8, 20)]
    assert "12 images have 12 sizes, and 12 of them repeat within their batches of 4" in BatchOrder(many, 2, 0, world=2).advice
    assert not BatchOrder(many, 1, 0).advice
    assert not BatchOrder([(8, 8)] * 3, 4, 0).advice  # three images of a subject: nothing to be done
    assert not BatchOrder([(8, 8)] * 9 + many[:5], 4, 0).advice


def test_impossible_orders():
    with pytest.raises(ValueError, match="at least one example, found none"):
        BatchOrder([], 1, 0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        BatchOrder(SIZES, 0, 0)
    with pytest.raises(ValueError, match=r"rank: expected 0 to 1 \(world = 2\), found 2"):
        BatchOrder(SIZES, 1, 0, rank=2, world=2)
    with pytest.raises(ValueError, match="step: expected at least 0, found -1"):
        BatchOrder(SIZES, 1, 0).batch(-1)


# --- pictures


def one(tmp_path, **options):
    return ImageFolder(tmp_path, caption="x", **SMALL, **options).read(0).pixels


def test_scaled_to_cover_and_cut_in_the_middle(tmp_path):
    picture(300, 100).save(tmp_path / "wide.png")
    pixels = one(tmp_path, buckets=False)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels[0, 16, 0] == pytest.approx(-1 / 3, abs=0.05)  # red runs along the width: the middle third is left
    assert pixels[0, 16, -1] == pytest.approx(1 / 3, abs=0.05)
    assert pixels[1, 0, 16] == pytest.approx(-1, abs=0.05)  # green down the height: all of it
    assert pixels[1, -1, 16] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_decoded_at_a_fraction(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(480, 320, 5).save(tmp_path / "a.jpg", quality=95, exif=exif)
    ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).save(tmp_path / "b.png")
    data = ImageFolder(tmp_path, caption="x", **SMALL)
    assert data.size(0) == data.size(1)
    torch.testing.assert_close(data[0].pixels, data[1].pixels, atol=4 / 255, rtol=0)


def test_odd_sizes(tmp_path):
    for name, shape in {"a": (1, 1), "b": (1, 500), "c": (500, 1), "d": (31, 33), "e": (7, 5)}.items():
        picture(*shape).save(tmp_path / f"{name}.png")
    data = ImageFolder(tmp_path, caption="x", **SMALL)
    for k in range(5):
        assert data.read(k).pixels.shape == (3, *data.size(k))
    assert data.summary()["enlarged"] == 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_turned_by_exif(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(80, 40).save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 95} if suffix != "png" else {}))
    upright = ImageOps.exif_transpose(Image.open(tmp_path / f"a.{suffix}"))
    data = ImageFolder(tmp_path, caption="x", **SMALL)
    height, width = data.size(0)
    assert (width > height) == (upright.width > upright.height)
    upright.convert("RGB").save(tmp_path / "a.png" if suffix != "png" else tmp_path / "b.png")
    plain = ImageFolder(tmp_path, caption="x", **SMALL)
    assert plain.size(0) == plain.size(1) == data.size(0)
    torch.testing.assert_close(plain.read(0).pixels, plain.read(1).pixels)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "I;16", "LA", "RGBA", "Palette with alpha"])
def test_modes(tmp_path, mode):
    gray = Image.new("L", (40, 40), 255)
    match mode:
        case "I;16":
            image = Image.fromarray(np.full((40, 40), 128 * 257, np.uint16))
            expected = 128 / 127.5 - 1
        case "LA" | "RGBA":
            image = Image.new(mode, (40, 40), (0,) * (len(mode)))  # transparent black
            expected = 1.0
        case "Palette with alpha":
            image = Image.new("L", (40, 40), 3).convert("P")
            image.info["transparency"] = bytes([255, 255, 255, 0])  # an alpha per color
            expected = 1.0
        case _:
            image, expected = gray.convert(mode), 1.0
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    torch.testing.assert_close(one(tmp_path), torch.full((3, 32, 32), expected), atol=0.01, rtol=0)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (40, 40), color) for color in ("white", "black", "red")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert one(tmp_path).min() == 1


def test_crops_and_mirrors_depend_on_seed_example_and_step_alone(tmp_path):
    picture(64, 32).save(tmp_path / "a.png")
    options = {"buckets": False, "center_crop": False, "flip": True, "caption": "x", **SMALL}
    data, again = ImageFolder(tmp_path, **options), ImageFolder(tmp_path, **options)
    views = [data.read(0, step).pixels for step in range(12)]
    for step in reversed(range(12)):
        assert torch.equal(again.read(0, step).pixels, views[step])
    assert len({tuple(v[0, 0].tolist()) for v in views}) == 12
    assert len({bool(v[0, 0, 0] < v[0, 0, -1]) for v in views}) == 2  # some mirrored, some not
    assert not torch.equal(ImageFolder(tmp_path, seed=1, **options).read(0, 0).pixels, views[0])
    still = ImageFolder(tmp_path, **{**options, "center_crop": True, "flip": False})
    assert torch.equal(still.read(0, 0).pixels, still.read(0, 5).pixels)


# --- folders


def test_folder_with_text_files(folder):
    data = ImageFolder(folder, **SMALL)
    assert len(data) == 10
    assert [data[k].name for k in range(10)] == ["more/p9.png", *(f"p{k}.png" for k in range(9))]
    assert data[3].caption == "picture number 2"
    for k in range(10):
        assert data[k].pixels.shape == (3, *data.size(k))
        assert -1 <= data[k].pixels.min() < data[k].pixels.max() <= 1
    assert len(set(data.sizes)) > 2
    assert {ImageFolder(folder, buckets=False, **SMALL).size(k) for k in range(10)} == {(32, 32)}


def test_folder_with_metadata(folder):
    for file in folder.rglob("*.txt"):
        file.unlink()
    lines = [json.dumps({"file_name": f"p{k}.png", "text": f"é {k}"}, ensure_ascii=k % 2 == 0) for k in range(9)]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\r\n".join([*lines, ""]), encoding="utf-8", newline="")
    (folder / "more" / "metadata.jsonl").write_text('{"file_name": "./p9.png", "text": "nine"}\n')
    (folder / "LICENSE.txt").write_text("not a caption")
    data = ImageFolder(folder, **SMALL)
    assert [data[k].caption for k in (0, 1, 2)] == ["nine", "é 0", "é 1"]
    assert data.summary()["captions"] == "metadata.jsonl"


def test_summary_has_counts_and_no_names(folder, tmp_path):
    summary = ImageFolder(folder, **SMALL).summary()
    assert summary["images"] == sum(summary["buckets"].values()) == 10
    assert summary["enlarged"] == 1
    assert summary["captions"] == "txt"
    assert str(tmp_path) not in json.dumps(summary)
    elsewhere = folder.rename(tmp_path / "elsewhere")
    assert ImageFolder(elsewhere, **SMALL).summary() == summary
    (elsewhere / "p0.txt").write_text("other")
    changed = ImageFolder(elsewhere, **SMALL).summary()
    assert changed.pop("content") != summary["content"]
    (elsewhere / "p0.txt").write_text("picture number 0")
    hashes = set()
    for end in (b"", b"a", b"b"):  # another length, and another end
        (elsewhere / "p0.png").write_bytes(png(50, 50, 0) + end)
        hashes.add(ImageFolder(elsewhere, **SMALL).summary()["content"])
    assert len(hashes) == 3
    assert summary["content"] in hashes


def test_system_files_are_passed_over(folder):
    (folder / "._p0.png").write_bytes(b"resource fork")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(b"")
    (folder / "notes.md").write_text("hello")
    assert len(ImageFolder(folder, on_corrupt="stop", **SMALL)) == 10


def test_no_folder_no_images(tmp_path):
    with pytest.raises(DataError, match="nowhere: expected a folder, found nothing"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "a.xyz").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected a folder, found a file"):
        ImageFolder(tmp_path / "a.xyz")
    with pytest.raises(DataError, match=r"no images; looked for \.png, \.jpg, .*, in subfolders too"):
        ImageFolder(tmp_path)


def test_images_without_captions_and_the_reverse(folder):
    for k in range(4):
        (folder / f"p{k}.txt").rename(folder / f"q{k}.txt")
    with pytest.raises(
        DataError, match=r"4 of 10 images have no caption \(p0\.png, p1\.png, p2\.png, \.\.\.\): expected NAME\.txt"
    ):
        ImageFolder(folder)
    for k in range(4):
        (folder / f"p{k}.png").unlink()
    with pytest.raises(DataError, match=r"4 captions have no image \(q0\.txt, q1\.txt, q2\.txt, \.\.\.\); looked for \.png"):
        ImageFolder(folder)
    assert len(ImageFolder(folder, caption="a photo", **SMALL)) == 6


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"file_name": "p0.png", "text": "a"}', "{oops"], r"metadata\.jsonl:2: expected one JSON object in the line: Expecting property name"),
        (['{"file_name": "p0.png"}'], r'metadata\.jsonl:1: expected a string as "text"$'),
        (['{"file_name": "p0.png", "text": 3}'], r'metadata\.jsonl:1: expected a string as "text", found int'),
        (['{"text": "a"}'], r'metadata\.jsonl:1: expected a string as "file_name"'),
        (["[1]"], r"metadata\.jsonl:1: expected an object, found list"),
        (['{"file_name": "p0.png", "text": "\\ud800"}'], r"metadata\.jsonl:1: .*surrogates not allowed"),
        (['{"file_name": "p0.png", "text": "a"}'] * 2, r"metadata\.jsonl:2: p0\.png has a caption already"),
        (['{"file_name": "p0.png", "text": "a"}'], r"9 of 10 images have no caption .*expected a line in metadata\.jsonl"),
        ([f'{{"file_name": "{n}.png", "text": "a"}}' for n in ["more/p9", "gone", *(f"p{k}" for k in range(9))]],
         r"1 captions have no image \(gone\.png\)"),
    ],
)  # fmt: skip
def test_bad_metadata(folder, lines, message):
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        ImageFolder(folder)


def test_caption_that_is_not_utf8(folder):
    (folder / "p3.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"p3\.txt: not UTF-8: .* at byte 3"):
        ImageFolder(folder)


def bomb():
    """A header that promises 100,000 x 100,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", png(50, 50)[:20], bomb()], ids=["empty", "html", "cut", "bomb"])
def test_broken_headers(folder, content):
    (folder / "p0.png").write_bytes(content)
    said = []
    data = ImageFolder(folder, warn=said.append, **SMALL)
    assert len(data) == 9
    assert data.summary()["skipped"] == 1
    assert list(data.skipped) == ["p0.png"]
    assert len(said) == 1
    assert said[0].startswith("p0.png: cannot be decoded: ")
    assert said[0].endswith("(skipped)")
    with pytest.raises(CorruptError, match=r"^p0\.png: cannot be decoded"):
        ImageFolder(folder, on_corrupt="stop")


def test_more_pixels_than_pillow_likes(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    (tmp_path / "a.png").write_bytes(png(50, 50))
    (tmp_path / "b.png").write_bytes(png(80, 50))
    with pytest.warns(Image.DecompressionBombWarning):
        data = ImageFolder(tmp_path, caption="x", warn=lambda line: None, **SMALL)
    assert data.skipped == {"b.png": "b.png: cannot be decoded: 80 x 50 pixels, more than Pillow's limit of 3,000"}


def test_broken_pixels_are_stood_in_for(folder):
    (folder / "p0.png").write_bytes(truncated(png(50, 50)))
    said = []
    index = 1  # after more/p9.png
    data = ImageFolder(folder, warn=said.append, **SMALL)
    assert not data.skipped
    assert len(data) == 10
    same = next(k for k in [*range(index + 1, 10), *range(index)] if data.size(k) == data.size(index))
    assert same != index + 1  # a neighbor of another shape is passed over
    for _ in range(2):
        stand_in = data[index]
        assert stand_in.name == data[same].name
        assert stand_in.caption == data[same].caption
        assert torch.equal(stand_in.pixels, data[same].pixels)
    assert len(said) == 1
    assert said[0].startswith("p0.png: cannot be decoded: ")
    with pytest.raises(CorruptError, match=r"^p0\.png"):
        ImageFolder(folder, on_corrupt="stop", **SMALL).read(index)
    others = [k for k in range(10) if data.size(k) == data.size(index) and k not in (index, same)]
    assert data.read(index, among=[index, others[-1]]).name == data[others[-1]].name, "one that is held out never stands in"


def test_nothing_left(folder):
    for k in range(9):
        (folder / f"p{k}.png").write_bytes(truncated(png(50, 50)))
    (folder / "more" / "p9.png").write_bytes(b"")
    data = ImageFolder(folder, warn=lambda line: None, **SMALL)
    with pytest.raises(DataError, match=r"none of the 32x32 images can be decoded: more/p9\.png"):
        data.read(0)
    for k in range(9):
        (folder / f"p{k}.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 10 images can be read"):
        ImageFolder(folder, warn=lambda line: None)


def test_a_vanished_file_is_not_skipped(folder):
    data = ImageFolder(folder, **SMALL)
    (folder / "p0.png").unlink()
    with pytest.raises(DataError, match=r"^p0\.png: cannot be opened: No such file"):
        data.read(1)
    with pytest.raises(ValueError, match="on_corrupt: expected skip or stop, found 'ignore'"):
        ImageFolder(folder, on_corrupt="ignore")


# --- streams


def stream(shards, **options):
    return ImageStream(shards, **{**SMALL, "batch_size": 2, "shuffle": 5, **options})


def take(data, count):
    return [[(e.name, e.caption) for e in data.next_batch()] for _ in range(count)]


def test_stream_in_order(shards):
    data = ImageStream(shards, 32, 1, bucket_step=8, shuffle=0)
    batches = [data.next_batch()[0] for _ in range(24)]
    assert [e.caption for e in batches] == [f"picture {k}" for k in range(24)]
    assert batches[0].name == "set-000.tar/s000"
    assert batches[23].name == "set-002.tar/s023"
    sizes = bucket_sizes(32, 8)
    for k, example in enumerate(batches):
        assert example.pixels.shape == (3, *nearest_bucket(sizes, *SHAPES[k % len(SHAPES)]))
    assert data.next_batch()[0].name == "set-000.tar/s000"
    assert data.epoch == 1


@pytest.mark.parametrize("shuffle", [0, 5, 1000])
def test_each_sample_once_per_epoch_and_one_size_per_batch(shards, shuffle):
    data = stream(shards, batch_size=1, shuffle=shuffle)
    names = [data.next_batch()[0].name for _ in range(72)]
    for epoch in range(3):
        assert len(set(names[24 * epoch :][:24])) == 24
    assert (names[:24] == names[24:48]) == (shuffle == 0)
    data = stream(shards, batch_size=3, shuffle=shuffle)
    for _ in range(40):
        assert len({e.pixels.shape for e in data.next_batch()}) == 1


def test_crops_of_a_stream_change_with_the_epoch(shards):
    data = stream(shards, batch_size=1, shuffle=0, center_crop=False)
    epochs = [[data.next_batch()[0].pixels for _ in range(24)] for _ in range(3)]
    for wide in (1, 4):  # 90 x 50 and 33 x 37 leave room
        assert len({tuple(epoch[wide].flatten().tolist()) for epoch in epochs}) == 3


def test_a_stream_is_a_function_of_its_seed(shards):
    straight = take(stream(shards), 30)
    assert take(stream(shards), 30) == straight
    assert take(stream(shards, seed=1), 30) != straight


@pytest.mark.parametrize("world", [2, 3])
def test_n_processes_stream_what_one_streams(shards, world):
    alone = stream(shards, batch_size=6, center_crop=False, flip=True)
    ranks = [stream(shards, batch_size=6 // world, rank=r, world=world, center_crop=False, flip=True) for r in range(world)]
    for _ in range(15):
        whole, parts = alone.next_batch(), [e for r in ranks for e in r.next_batch()]
        assert [e.name for e in parts] == [e.name for e in whole]
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(parts, whole, strict=True))
    assert ranks[0].state_dict() == ranks[-1].state_dict() == alone.state_dict()


@pytest.mark.parametrize("shuffle", [0, 5, 1000])
def test_resuming_a_stream_is_exact(shards, shuffle):
    straight = stream(shards, shuffle=shuffle, center_crop=False)
    expected = [straight.next_batch() for _ in range(30)]
    interrupted = stream(shards, shuffle=shuffle, center_crop=False)
    for k in range(29):
        state = json.loads(json.dumps(interrupted.state_dict()))
        resumed = stream(shards, shuffle=shuffle, center_crop=False)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for batch in expected[k : k + 2]:
            for got, wanted in zip(resumed.next_batch(), batch, strict=True):
                assert (got.name, got.caption) == (wanted.name, wanted.caption)
                assert torch.equal(got.pixels, wanted.pixels)
        interrupted.next_batch()


def test_resuming_with_other_processes(shards):
    alone = stream(shards, batch_size=4)
    take(alone, 3)
    ranks = [stream(shards, batch_size=2, rank=r, world=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    assert [[e for r in ranks for e in take(r, 1)[0]] for _ in range(5)] == take(alone, 5)


def test_resuming_something_else(shards):
    state = stream(shards).state_dict()
    with pytest.raises(DataError, match="cannot resume this data: batch is 3 here, and was 2 when the state was saved"):
        stream(shards, batch_size=3).load_state_dict(state)
    with (shards / "set-001.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match="cannot resume this data: content is"):
        stream(shards).load_state_dict(state)


def test_which_shards(shards, monkeypatch):
    names = [f"set-{k:03}.tar" for k in range(3)]
    for given in (shards, str(shards), shards / "*.tar", f"{shards}/set-{{000..002}}.tar", [shards, *shards.glob("*.tar")],
                  [f"{shards}/set-00{{0..1}}.tar", shards / "set-002.tar"]):  # fmt: skip
        assert [path.name for path in find_shards(given)] == names
    with pytest.raises(DataError, match=r"2 of 5 shards are not there: .*set-003\.tar, .*set-004\.tar"):
        find_shards(f"{shards}/set-{{000..004}}.tar")
    with pytest.raises(DataError, match=r"elsewhere\*: no \.tar files"):
        find_shards(shards / "elsewhere*")
    summary = stream(shards).summary()
    assert summary["shards"] == 3
    assert str(shards) not in json.dumps(summary)
    data = stream(shards)
    data.next_batch()
    assert data.summary() == summary  # what the data is, not how far it was read


def test_names_in_shards(tmp_path):
    """Folders, dots in names, pax headers of long names, and what macOS and webdataset put in between."""
    long = "very-" * 40 + "long"
    write_tar(
        tmp_path / "a.tar",
        {
            "__meta__.json": b"{}", "x/._0.png": b"", "x/0.png": png(32, 32), "x/0.seg.png": b"mask", "x/0.txt": b"zero",
            "y/0.TXT": b"other folder", "y/0.PNG": png(32, 32), f"{long}.jpeg": png(32, 32), f"{long}.txt": b"long",
        },
    )  # fmt: skip
    data = stream(tmp_path, batch_size=1, shuffle=0)
    expected = [[("a.tar/x/0", "zero")], [("a.tar/y/0", "other folder")], [(f"a.tar/{long}", "long")]]
    for k in range(3):
        resumed = stream(tmp_path, batch_size=1, shuffle=0)
        resumed.load_state_dict(data.state_dict())
        assert take(resumed, 1) == [expected[k]]
        assert take(data, 1) == [expected[k]]
    assert not data.skipped


def test_broken_samples(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {
            "0.png": png(32, 32), "0.txt": b"zero",
            "1.png": b"no picture", "1.txt": b"one",
            "2.png": png(32, 32),
            "3.txt": b"three",
            "4.png": png(32, 32), "4.txt": b"\xff",
            "5.png": png(32, 32), "5.json": b'{"title": "no caption"}',
            "6.png": truncated(png(50, 50)), "6.txt": b"six",
            "7.png": png(32, 32), "7.txt": b"seven",
        },
    )  # fmt: skip
    said = []
    data = stream(tmp_path, batch_size=3, shuffle=0, warn=said.append)
    assert [e.caption for e in data.next_batch()] == ["zero", "seven", "seven"]  # row 2 stands in for row 1
    reasons = ["1: cannot be decoded", "2: no caption", "3: no picture", "4: caption: not UTF-8", '5: caption: expected a string as "text"',
               "6: cannot be decoded"]  # fmt: skip
    assert [line.startswith(f"a.tar/{reason}") for line, reason in zip(said, reasons, strict=True)] == [True] * 6
    assert list(data.skipped) == [f"a.tar/{k}" for k in range(1, 7)]
    assert take(stream(tmp_path, batch_size=2, shuffle=0, warn=len), 1) == [[("a.tar/0", "zero")] * 2]  # and round the end
    take(data, 4)
    assert len(said) == 6  # once each, however many epochs
    ranks = [stream(tmp_path, batch_size=1, shuffle=0, rank=r, world=3, warn=said.append) for r in range(3)]
    assert [take(r, 1)[0][0][1] for r in ranks] == ["zero", "seven", "seven"]
    with pytest.raises(CorruptError, match=r"^a\.tar/1: cannot be decoded"):
        stream(tmp_path, on_corrupt="stop").next_batch()


def test_a_batch_without_one_good_picture_is_left_out(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": truncated(png(50, 50)), "0.txt": b"0", "1.png": png(32, 32), "1.txt": b"1"})
    data = stream(tmp_path, batch_size=1, shuffle=0, warn=lambda line: None)
    assert take(data, 3) == [[("a.tar/1", "1")]] * 3


@pytest.mark.parametrize("damage", ["cut in a picture", "overwritten header", "not a tar", "compressed"])
def test_damaged_shards(shards, damage):
    path = shards / "set-001.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        fifth = tar.getmembers()[8]
    match damage:
        case "cut in a picture":
            path.write_bytes(data[: fifth.offset_data + 40])
        case "overwritten header":
            path.write_bytes(data[: fifth.offset] + b"\x01" * 512 + data[fifth.offset + 512 :])
        case "not a tar":
            path.write_bytes(b"hello" * 1000)
        case "compressed":
            path.write_bytes(gzip.compress(data))
    said = []
    stream_ = stream(shards, batch_size=1, warn=said.append)
    names = set()
    while stream_.epoch == 0:
        names |= {e.name for e in stream_.next_batch()}
    assert sum(n.startswith("set-001") for n in names) == (4 if damage in ("cut in a picture", "overwritten header") else 0)
    assert sum(not n.startswith("set-001") for n in names) == 16
    assert any(line.startswith("set-001.tar: not a whole, uncompressed tar file") for line in said)
    with pytest.raises(CorruptError, match=r"^set-001\.tar"):
        take(stream(shards, batch_size=1, on_corrupt="stop"), 24)


def test_nothing_usable_in_a_stream(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(32, 32)})
    with pytest.raises(DataError, match=r"no usable sample in 1 shards: a\.tar/0: no caption"):
        stream(tmp_path, warn=lambda line: None).next_batch()
    write_tar(tmp_path / "a.tar", {f"{k}.png": png(4, 4) for k in range(150)})
    with pytest.raises(DataError, match=r"the first 100 samples are all unusable: a\.tar/0: no caption"):
        stream(tmp_path, warn=lambda line: None).next_batch()
    write_tar(tmp_path / "a.tar", {"0.png": truncated(png(50, 50)), "0.txt": b"0"})
    with pytest.raises(DataError, match=r"100 batches without one picture that can be decoded: a\.tar/0"):
        stream(tmp_path, warn=lambda line: None).next_batch()
    with pytest.raises(ValueError, match="shuffle: expected at least 0, found -1"):
        stream(tmp_path, shuffle=-1)


def test_pictures_with_a_color_profile_are_brought_to_srgb(tmp_path) -> None:
    """A profile with red and green in each other's place: what it calls red is green. A broken one changes nothing."""
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    for mode, red in (("RGB", (255, 0, 0)), ("RGBA", (255, 0, 0, 255))):
        for name, profile in (("swapped", swapped), ("same", srgb), ("broken", b"x" * 200), ("none", None)):
            Image.new(mode, (64, 64), red).save(
                tmp_path / f"{mode}-{name}.png", **({"icc_profile": profile} if profile else {})
            )
    folder = ImageFolder(tmp_path, 64, caption="")
    found = {folder.name(k): folder[k].pixels[:, 0, 0].tolist() for k in range(len(folder))}
    for name, pixel in found.items():
        expected = [-1, 1, -1] if "swapped" in name else [1, -1, -1]
        assert pixel == pytest.approx(expected, abs=0.05), name


# --- files as people have them


def saved(path, kind, **options):
    picture(60, 40).save(path, kind, **options)


def test_pictures_are_known_by_what_is_in_them(tmp_path):
    """Every kind that Pillow reads, under its names, under a wrong one and under none."""
    kinds = {"a.tif": "TIFF", "b.gif": "GIF", "c.jfif": "JPEG", "d.avif": "AVIF", "e.png": "JPEG", "f": "PNG", "g.photo": "WEBP",
             "h.JPE": "JPEG", "i.bin": "TIFF"}  # fmt: skip
    for name, kind in kinds.items():
        saved(tmp_path / name, kind)
    (tmp_path / "notes").write_bytes(b"no picture")
    folder = ImageFolder(tmp_path, caption="a photo", **SMALL)
    assert [folder.name(k) for k in range(len(folder))] == sorted(kinds)
    original = folder[0].pixels
    for k in range(len(folder)):
        assert (folder[k].pixels - original).abs().mean() < 0.1, folder.name(k)


def test_heic_with_the_package_and_without(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(picture(64, 48)).save(tmp_path / "photo.heic")
    assert len(ImageFolder(tmp_path, caption="a photo", **SMALL)) == 1
    monkeypatch.setattr(images, "_formats", lambda: ("PNG", "JPEG"))
    with pytest.raises(DataError, match=r"photo\.heic: .*pip install pillow-heif"):
        ImageFolder(tmp_path, caption="a photo", warn=len, **SMALL)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_is_turned_once(tmp_path, orientation):
    whole = picture(60, 40)
    whole.save(tmp_path / "a.tif", "TIFF", tiffinfo={274: orientation})
    turned = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    (whole if turned is None else whole.transpose(turned)).save(tmp_path / "b.png")
    folder = ImageFolder(tmp_path, caption="a photo", **SMALL)
    assert folder.size(0) == folder.size(1)
    torch.testing.assert_close(folder[0].pixels, folder[1].pixels)


def test_what_is_left_out_is_named_and_counted(folder):
    (folder / "raw.CR2").write_bytes(b"II*\0" + bytes(100))
    (folder / "raw.txt").write_text("a photo")
    (folder / "film.mp4").write_bytes(b"....")
    (folder / "p1.txt").write_bytes(b"")
    (folder / "p2.txt").write_bytes(bytes(12))
    said = []
    found = ImageFolder(folder, warn=said.append, **SMALL)
    assert len(found) == 10 and len(said) == 2
    assert said[0] == "film.mp4: a file of this kind is not read: save it as PNG or JPEG (skipped)"
    assert found.advice.startswith("2 of 12 images are left out, see above; 2 of 10 captions are empty (p1.png, p2.png)")
    with pytest.raises(CorruptError, match=r"^film\.mp4"):
        ImageFolder(folder, on_corrupt="stop", **SMALL)


def test_files_that_are_no_images_are_named(folder):
    """Kinds of raw files and layered pictures that nobody has thought of."""
    for name in ("a.jxr", "b.kdc", "more/c", "Thumbs.db", "notes.md", "run.toml"):
        (folder / name).write_bytes(b"no picture")
    found = ImageFolder(folder, **SMALL)
    assert found.advice == "3 other files are not known as images, and are left alone (a.jxr, b.kdc, more/c)"
    for file in folder.glob("*.png"):
        file.unlink()
    shutil.rmtree(folder / "more")
    with pytest.raises(DataError, match=r"no images; looked for .*; there are Thumbs\.db, a\.jxr, b\.kdc, \.\.\."):
        ImageFolder(folder, **SMALL)


@pytest.mark.parametrize("suffix", [".jpx", ".j2c", ".pbm", ".pnm", ".vda", ".AVIFS", ".TGA"])
def test_pictures_of_other_suffixes(folder, suffix):
    kind = Image.registered_extensions()[suffix.lower()]
    picture(40, 40).convert("1" if suffix == ".pbm" else "RGB").save(folder / f"p0{suffix}", kind)
    (folder / "p0.png").unlink()
    found = ImageFolder(folder, **SMALL)
    assert len(found) == 10 and f"p0{suffix}" in [found.name(k) for k in range(10)] and not found.skipped


def test_an_edit_that_changes_neither_size_nor_ends_nor_date_is_noticed(folder, tmp_path):
    """Of a picture that is not compressed; in the run's identity, and in what is kept of encoded images."""
    for file in folder.rglob("*.png"):
        file.unlink()
    for seed, file in enumerate(folder.rglob("*.txt")):
        picture(64, 64, seed).save(file.with_suffix(".bmp"))
    was = ImageFolder(folder, **SMALL).summary()
    counts, _ = encoded(folder, Kept(tmp_path / "kept", memory=0))
    path, content = folder / "p3.bmp", bytearray((folder / "p3.bmp").read_bytes())
    date = path.stat().st_mtime_ns
    content[len(content) // 3] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(date, date))
    now = ImageFolder(folder, **SMALL).summary()
    assert now["content"] != was["content"] and {**now, "content": 0} == {**was, "content": 0}
    path.rename(folder / "renamed.bmp")
    (folder / "p3.txt").rename(folder / "renamed.txt")
    again, _ = encoded(folder, Kept(tmp_path / "kept", memory=0))
    assert (counts["images"], again["images"]) == (10, 1), "the one that was edited, and no other"


def test_linked_folders_are_followed_once(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "linked.png").write_bytes(png(40, 40))
    (other / "linked.txt").write_text("linked")
    (folder / "link").symlink_to(other, target_is_directory=True)
    (other / "round").symlink_to(folder, target_is_directory=True)
    found = ImageFolder(folder, **SMALL)
    assert [found.name(k) for k in range(len(found))].count("link/linked.png") == 1
    assert len(found) == 11


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_captions_in_other_encodings(folder, encoding):
    (folder / "p0.txt").write_bytes("a caf\u00e9 at night, \u732b".encode(encoding))
    assert ImageFolder(folder, **SMALL)[1].caption == "a caf\u00e9 at night, \u732b"
    names = [*(f"p{k}.png" for k in range(9)), "more/p9.png"]
    (folder / "metadata.jsonl").write_bytes(
        "\n".join(json.dumps({"file_name": n, "text": "x"}) for n in names).encode(encoding)
    )
    assert ImageFolder(folder, **SMALL)[0].caption == "x"


SEEN = "\u4e00\u53ea \u7ea2\u8272\u7684 \u732b\u5728\u5c4b\u9876\u4e0a"  # "a red cat on the roof"


@pytest.mark.parametrize(
    "content",
    [
        SEEN.encode("utf-16-le"),  # of which only the blanks have a 0
        SEEN.encode("utf-16-be"),
        f"\ufeff\ufeff{SEEN}\x9b\x85\0".encode(),
        SEEN.replace(" ", "\r\n").encode("utf-32"),
    ],
)
def test_captions_of_programs_that_write_no_mark_or_two(folder, content):
    (folder / "p0.txt").write_bytes(content)
    assert ImageFolder(folder, **SMALL)[1].caption == SEEN


def test_half_a_character_too_much(folder):
    (folder / "p0.txt").write_bytes("a cat".encode("utf-16-le") + b"\0")
    assert ImageFolder(folder, **SMALL)[1].caption == "a cat"


def test_captions_that_cannot_be_seen_are_empty(folder):
    (folder / "p0.txt").write_text("\u200b \u2060\u200d\u00a0\ufeff", encoding="utf-8")
    assert "1 of 10 captions are empty (p0.png)" in ImageFolder(folder, **SMALL).advice


@pytest.mark.parametrize(("content", "message"), [
    (b"word " * 100_000, r"p0\.txt: 499,999 characters are no caption, expected at most 20,000"),
    ("caf\u00e9".encode("latin-1"), r"p0\.txt: not UTF-8: .* at byte 3; save it as UTF-8"),
])  # fmt: skip
def test_texts_that_are_no_captions(folder, content, message):
    (folder / "p0.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ImageFolder(folder, **SMALL)


@pytest.mark.parametrize("suffix", [".caption", ".png.txt", ".TXT"])
def test_captions_under_other_names(folder, suffix):
    (folder / "p0.txt").rename(folder / f"p0{suffix}")
    assert ImageFolder(folder, **SMALL)[1].caption


def test_a_table_of_columns(folder):
    """The other form of Hugging Face's imagefolder; beside a metadata.jsonl it is not looked at."""
    names = [*(f"p{k}.png" for k in range(9)), "more/p9.png"]
    (folder / "Metadata.csv").write_text("file_name,text\r\n" + "".join(f'{n},"a ""{n}"", seen"\r\n' for n in names))
    found = ImageFolder(folder, **SMALL)
    assert found[1].caption == 'a "p0.png", seen' and found.summary()["captions"] == "metadata.csv"
    (folder / "Metadata.csv").write_text("file_name,text\np0.png\n")
    with pytest.raises(DataError, match=r'Metadata\.csv:2: expected a string as "text"'):
        ImageFolder(folder, **SMALL)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": None, "caption": n}) for n in names))
    assert ImageFolder(folder, **SMALL)[1].caption == "p0.png"


def test_a_name_of_any_length_is_cut_in_messages(folder):
    names = [*(f"p{k}.png" for k in range(9)), "more/p9.png", "x" * 5000]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": "a"}) for n in names))
    with pytest.raises(DataError, match=r"metadata\.jsonl: 1 captions have no image \(x{300}\.\.\.\); looked for"):
        ImageFolder(folder, **SMALL)


@pytest.mark.parametrize("text", ['{"file_name": "p0.png", "text": "a"},', '[{"file_name": "p0.png", "text": "a"}'])
def test_a_table_that_is_one_json_value(folder, text):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"metadata\.jsonl:1: expected one JSON object in the line: .* at character \d+$"):
        ImageFolder(folder, **SMALL)


@pytest.mark.parametrize("form", ["data/{}", "./{}", "C:\\sets\\data\\{}", "/home/me/data/{}", "{}"])
def test_names_in_metadata_as_other_programs_write_them(folder, form):
    (folder / "p0.png").rename(folder / unicodedata.normalize("NFD", "caf\u00e9.png"))
    names = ["caf\u00e9.png", *(f"p{k}.png" for k in range(1, 9)), "more/p9.png"]
    backslashes = "\\" in form
    lines = [{"file_name": form.format(n.replace("/", "\\") if backslashes else n), "text": f"this is {n}"} for n in names]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = ImageFolder(folder, **SMALL)
    assert {unicodedata.normalize("NFC", found.name(k)): found[k].caption for k in range(10)} == {
        n: f"this is {n}" for n in names
    }


def test_text_files_in_another_unicode_form(folder):
    for suffix, form in (("png", "NFD"), ("txt", "NFC")):
        (folder / f"p0.{suffix}").rename(folder / unicodedata.normalize(form, f"caf\u00e9.{suffix}"))
    assert len(ImageFolder(folder, **SMALL)) == 10


def test_a_table_nested_too_deep(folder):
    (folder / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"metadata\.jsonl:1: "):
        ImageFolder(folder, **SMALL)


def test_how_much_is_cut_is_said(tmp_path):
    (tmp_path / "panorama.png").write_bytes(png(600, 100))
    (tmp_path / "square.png").write_bytes(png(100, 100))
    found = ImageFolder(tmp_path, caption="a photo", **SMALL)
    height, width = found.size(0)
    assert f"1 of 2 images lose more than 25% of themselves to be cut to their size (most: panorama.png, " \
           f"{1 - width / height / 6:.0%})" in found.advice  # fmt: skip
    assert not ImageFolder(tmp_path, caption="a photo", bucket_ratio=8.0, resolution=64, bucket_step=8).advice


def test_what_an_example_says_of_its_crop(tmp_path):
    """The original's size, and what is cut off in pixels of the result: SDXL is told so."""
    (tmp_path / "a.png").write_bytes(png(300, 100))
    square = {"resolution": 64, "buckets": False, "caption": "a photo"}
    example = ImageFolder(tmp_path, **square)[0]
    assert (example.original, example.crop) == ((100, 300), (0, 64))
    crops = set()
    for step in range(40):
        folder = ImageFolder(tmp_path, center_crop=False, flip=True, **square)
        example = folder.read(0, step)
        view = images.View.draw(f"0/0/{step}", False, True)
        crops.add((example.crop, view.mirrored))
        shown = example.pixels[0].mean(0)  # red rises to the right
        left = 128 - example.crop[1] if view.mirrored else example.crop[1]
        assert abs(float(shown.min() + 1) / 2 - left / 192) < 0.02
    assert len(crops) > 10


def in_srgb(color, matrix):
    """A color of other primaries, as sRGB has it: through linear light and XYZ."""
    srgb = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
    encoded = np.array(color) / 255
    light = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    shown = np.clip(np.linalg.solve(srgb, matrix @ light), 0, 1)
    return 255 * np.where(shown <= 0.0031308, 12.92 * shown, 1.055 * shown ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "RGBA", "palette with alpha"])
def test_profiles_of_every_mode(tmp_path, mode):
    """Display P3, whose primaries are wider: colors become stronger numbers in sRGB, gray stays."""
    from PIL import ImageCms

    p3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), p3.T, strict=True):
        entry = profile.index(tag)
        place = int.from_bytes(profile[entry + 4 : entry + 8], "big") + 8
        profile[place : place + 12] = b"".join(round(65536 * v).to_bytes(4, "big", signed=True) for v in values)
    color = (150, 150, 150) if mode == "LA" else (200, 100, 60)
    plain = Image.new("RGB", (40, 40), color)
    picture = {"RGB": plain, "P": plain.quantize(4), "LA": plain.convert("LA"), "RGBA": plain.convert("RGBA"),
               "palette with alpha": plain.quantize(4)}[mode]  # fmt: skip
    options = {"transparency": 3} if mode == "palette with alpha" else {}
    picture.save(tmp_path / "a.png", icc_profile=bytes(profile), **options)
    found = (ImageFolder(tmp_path, caption="a photo", **SMALL)[0].pixels.mean(dim=(1, 2)).numpy() + 1) * 127.5
    expected = in_srgb(color, p3)
    assert mode == "LA" or expected[0] - color[0] > 8, "it moves"
    assert np.abs(found - expected).max() < 2


# --- shards that are not as they should be


def header(name, size):
    """A tar header whose size may be anything."""
    info = tarfile.TarInfo(name)
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    field = size.to_bytes(12, "big", signed=True) if size < 0 else size.to_bytes(12, "big")
    data[124:136] = (b"\xff" if size < 0 else b"\x80") + field[1:]
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data):06o}\0 ".encode()
    return bytes(data)


@pytest.mark.parametrize("size", [-512, -1, -(2**40), 2**62, 2**80])
def test_a_member_whose_size_cannot_be(tmp_path, size):
    write_tar(tmp_path / "a.tar", {"0.png": png(32, 32), "0.txt": b"zero"})
    whole = (tmp_path / "a.tar").read_bytes()
    end = whole.rindex(b"zero") // 512 * 512 + 512
    (tmp_path / "a.tar").write_bytes(whole[:end] + header("1.png", size) + bytes(1024))
    said = []
    data = stream(tmp_path, batch_size=1, shuffle=0, warn=said.append)
    assert take(data, 3) == [[("a.tar/0", "zero")]] * 3
    assert 1 <= len(said) <= 2 and "a.tar: not a whole, uncompressed tar file" in said[-1]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"text": ' + "[" * 100_000, '{"text": "a", "n": ' + "9" * 5000 + "}", '{"a": 1e999}']
)
def test_json_that_cannot_be(tmp_path, text):
    members = {"0.png": png(32, 32), "0.json": text.encode(), "1.png": png(32, 32), "1.json": b'{"text": "one"}'}
    write_tar(tmp_path / "a.tar", members)
    said = []
    assert take(stream(tmp_path, batch_size=1, shuffle=0, warn=said.append), 2) == [[("a.tar/1", "one")]] * 2
    assert len(said) == 1 and said[0].startswith("a.tar/0: caption: ")


def test_an_unsorted_shard_says_how_to_sort_it(tmp_path):
    names = [f"{k}.png" for k in range(3)] + [f"{k}.txt" for k in range(3)]
    write_tar(tmp_path / "a.tar", {name: png(32, 32) if name.endswith("png") else b"text" for name in names})
    with pytest.raises(DataError, match=r"a\.tar/0: no caption .*must follow one another.*tar --sort=name"):
        stream(tmp_path, batch_size=1, shuffle=0, warn=len).next_batch()


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_called_so(tmp_path, packed):
    with tarfile.open(tmp_path / "a.tar", f"w:{packed}") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(DataError, match=r"a\.tar: .*it is compressed \((gzip|bzip2|xz)\), unpack it first"):
        stream(tmp_path, batch_size=1, shuffle=0, warn=len).next_batch()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_shard_are_named(tmp_path, kind):
    write_tar(tmp_path / "a.tar", {"0.png": png(32, 32), "0.txt": b"zero"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = kind, "0.png"
        tar.addfile(link)
        text = tarfile.TarInfo("1.txt")
        text.size = 3
        tar.addfile(text, io.BytesIO(b"one"))
    said = []
    assert take(stream(tmp_path, batch_size=1, shuffle=0, warn=said.append), 2) == [[("a.tar/0", "zero")]] * 2
    assert said[0].startswith("a.tar/1: no picture, only txt (png: links, which are not followed)")


def test_an_empty_shard_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(DataError, match=r"no usable sample in 1 shards: nothing in a\.tar"):
        stream(tmp_path, batch_size=1, shuffle=0).next_batch()


def test_a_caption_of_a_shard_in_utf_16(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(32, 32), "0.txt": "a cat".encode("utf-16-le")})
    assert take(stream(tmp_path, batch_size=1, shuffle=0), 1) == [[("a.tar/0", "a cat")]]


# --- what is kept of encoded images


def encoded(folder, kept, **options):
    """A source that counts what it encodes, and its batches."""
    counts = {"images": 0, "captions": 0}

    def encode(pixels):
        counts["images"] += 1
        return pixels.mean(1, keepdim=True)[..., ::8, ::8]

    def encode_text(caption):
        counts["captions"] += 1
        return {"context": torch.full((1, 2, 3), float(len(caption)))}

    source = FolderSource(ImageFolder(folder, **SMALL), encode, encode_text, kept=kept, **options)
    return counts, [source.batch(k) for k in range(20)]


def test_what_is_kept_is_bounded_and_the_rest_is_on_disk(folder, tmp_path):
    counts, expected = encoded(folder, Kept())
    assert counts == {"images": 10, "captions": 10}
    small = Kept(tmp_path / "kept", "vae", memory=200)
    counts, found = encoded(folder, small)
    assert counts == {"images": 10, "captions": 10} and sum(map(size_of, small._there.values())) <= 200
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.conditioning["context"], other.conditioning["context"])
    counts, _ = encoded(folder, Kept(None, memory=200))
    assert counts["images"] > 10, "nowhere to keep them"
    counts, _ = encoded(folder, Kept(tmp_path / "kept", "vae", memory=200))
    assert counts["images"] <= 2, "another process finds what is there"


def test_what_is_kept_is_for_these_sources_encoders_and_sizes(folder, tmp_path):
    def images(identity="vae"):
        return encoded(folder, Kept(tmp_path / "kept", identity, memory=0))[0]["images"]

    images()
    assert images() <= 1
    assert images("another vae") == 10
    (folder / "p1.png").write_bytes(png(64, 64, 77))
    assert images() in (1, 2)
    assert images() <= 1


@pytest.mark.parametrize("damage", ["cut", "one bit", "another's"])
def test_what_is_kept_and_damaged_is_made_again(folder, tmp_path, damage):
    """Noticed by a checksum: a changed number is a latent as good as any to safetensors."""
    _, expected = encoded(folder, Kept(tmp_path / "kept", memory=0))
    files = sorted((tmp_path / "kept").iterdir())
    first = files[0].read_bytes()
    for file in files:
        content = bytearray(file.read_bytes())
        content[-2] ^= 64
        file.write_bytes({"cut": content[:-3], "one bit": content, "another's": b"{}" + first[2:]}[damage])
    counts, found = encoded(folder, Kept(tmp_path / "kept", memory=0))
    assert counts == {"images": 10, "captions": 10}
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.conditioning["context"], other.conditioning["context"])
    assert encoded(folder, Kept(tmp_path / "kept", memory=0))[0]["images"] <= 1, "and written again"


def test_a_disk_that_refuses_what_is_kept(folder, tmp_path):
    (tmp_path / "kept").write_text("a file")
    said = []
    counts, _ = encoded(folder, Kept(tmp_path / "kept", memory=0, problem=said.append))
    assert counts["images"] >= 10 and len(said) == 1 and "will be encoded again" in said[0]
