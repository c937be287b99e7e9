"""Training Stable Diffusion models from diffusers: tiny ones with random weights, in a folder and in a single file."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image
from safetensors.torch import load_file, save_file

from styleinject_core import Adapter, AdapterConfig, attach, load_adapter, save_adapter
from styleinject_core.cli import main
from styleinject_core.hosts.architectures import describe
from styleinject_core.train.data.folder import ImageFolder
from styleinject_core.train.data.images import Example
from styleinject_core.train.data.source import FolderSource, LatentSource, StreamSource
from styleinject_core.train.models.pipeline import ModelError, PipelineModel
from styleinject_core.train.objectives.tasks import FineTune
from styleinject_core.train.random_numbers import RandomNumbers
from styleinject_core.train.settings import TrainSettings

CPU = torch.device("cpu")


def tokenizer(folder):
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def text_encoder(width, projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=60, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, projection_dim=width)  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def save_pipeline(folder, xl=False):
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    common = {"sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "attention_head_dim": 2, **blocks}
    vae = AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, norm_num_groups=32,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction")
    parts = {"vae": vae, "scheduler": scheduler, "tokenizer": tokenizer(folder.parent / "tokenizer")}
    if xl:
        unet = UNet2DConditionModel(**common, cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
                                    projection_class_embeddings_input_dim=6 * 8 + 16)  # fmt: skip
        pipeline = StableDiffusionXLPipeline(unet=unet, text_encoder=text_encoder(16), text_encoder_2=text_encoder(16, True),
                                             tokenizer_2=parts["tokenizer"], **parts)  # fmt: skip
    else:
        unet = UNet2DConditionModel(**common, cross_attention_dim=16)
        pipeline = StableDiffusionPipeline(unet=unet, text_encoder=text_encoder(16), safety_checker=None,
                                           feature_extractor=None, requires_safety_checker=False, **parts)  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"sd": save_pipeline(folder / "tiny-sd"), "xl": save_pipeline(folder / "tiny-xl", xl=True)}


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_trains(models, kind, dtype):
    model = PipelineModel.load(models[kind], CPU, dtype)
    assert model.schedule.prediction_type == "v_prediction"
    prompts = model.encode_text(["a cat", "dog"])
    assert ("pooled" in prompts) == (kind == "xl")
    latents = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert latents.shape == (2, 4, 16, 16)
    assert model.decode(latents).shape == (2, 3, 32, 32)
    adapter = Adapter.create(model.denoiser, AdapterConfig(r=2, n_styles=2, target_modules=("to_q", "to_v")))
    source = LatentSource(list(latents), prompts, batch_size=2)
    task = FineTune(model, source, TrainSettings(batch_size=2, caption_dropout=0.5), model.encode_text([""]))
    with task.installed(adapter):
        task.loss(RandomNumbers(0, 0)).backward()
    gradients = [p.grad for layer in adapter.layers.values() for p in (layer.B, layer.hyper_weight)]
    assert all(g is not None and g.dtype == torch.float32 and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_its_pictures_depend_on_prompt_and_seed(models, kind):
    model = PipelineModel.load(models[kind], CPU, torch.float32)
    first, second = model.sample(["a cat", "a cat"], 16, seed=3, steps=2)
    assert first.shape == (4, 8, 8)
    assert not torch.equal(first, second)
    torch.testing.assert_close(model.sample(["a cat"], 16, seed=4, steps=2)[0], second)
    assert model.pipeline.scheduler.config.prediction_type == "v_prediction"


def test_the_command_on_a_pipeline(models, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(3):
        Image.new("RGB", (64, 64 + 64 * (k == 2)), (80 * k, 0, 90)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text("a cat")
    config = tmp_path / "c.toml"
    config.write_text(f"""
        model.path = {json.dumps(str(models["sd"]))}
        data = {{ folder = "pictures", resolution = 64 }}
        adapter = {{ rank = 2, styles = 2 }}
        train = {{ steps = 2, sample_every = 2, gradient_checkpointing = true }}
        output = {{ folder = "run", prompts = ["a cat"] }}
    """)
    assert main(["train", str(config)]) == 0
    metadata = load_adapter(tmp_path / "run" / "adapter.safetensors").metadata
    assert metadata["styleinject.base"] == "tiny-sd"
    assert metadata["modelspec.prediction_type"] == "v"  # ModelSpec's word
    assert str(models["sd"].parent) not in json.dumps(metadata)
    assert (tmp_path / "run" / "samples" / "step-000002.png").exists()
    assert describe(load_adapter(tmp_path / "run" / "adapter.safetensors"))


def test_a_teacher_of_another_kind(models, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    config = """
        model.path = {}
        teacher.path = {}
        data = {{ resolution = 64 }}
        adapter = {{ rank = 2, styles = 2 }}
        train = {{ steps = 1 }}
        distil = {{ prompts = "prompts.txt", sampling_steps = 1 }}
        output = {{ folder = "run" }}
    """
    paths = {name: json.dumps(str(path)) for name, path in models.items()}
    for pair, message in [((paths["sd"], '"demo"'), "teacher.path: the teacher's latents are"),
                          ((paths["sd"], paths["xl"]), "distil.shared_text_encoder: the teacher reads prompts of"),
                          ((paths["sd"], paths["sd"]), "teacher.path: teacher and student are the same model")]:  # fmt: skip
        (tmp_path / "c.toml").write_text(config.format(*pair))
        assert main(["distill", str(tmp_path / "c.toml")]) == 1
        assert message in capsys.readouterr().err


def test_sdxl_keeps_its_vae_in_float32(models):
    """It overflows in float16, and says so by force_upcast."""
    model = PipelineModel.load(models["xl"], CPU, torch.float16)
    assert model.pipeline.vae.config.force_upcast and model.pipeline.vae.dtype == torch.float32
    latents = model.encode(torch.rand(1, 3, 32, 32) * 2 - 1)
    assert latents.isfinite().all() and model.decode(latents).isfinite().all()


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip


def in_one_file(folder, path):
    """The tiny Stable Diffusion as a checkpoint of the original program: its U-Net of two levels, one block each."""
    unet, vae, clip = (
        load_file(folder / part / name)
        for part, name in [("unet", "diffusion_pytorch_model.safetensors"), ("vae", "diffusion_pytorch_model.safetensors"),
                           ("text_encoder", "model.safetensors")]
    )  # fmt: skip
    tops = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
            "conv_norm_out": "out.0", "conv_out": "out.2", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
            "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
            "down_blocks.1.resnets.0": "input_blocks.3.0", "mid_block.resnets.0": "middle_block.0",
            "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
            "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv"}  # fmt: skip
    for level in (0, 1):
        for block in (0, 1):
            tops[f"up_blocks.{level}.resnets.{block}"] = f"output_blocks.{2 * level + block}.0"
            tops[f"up_blocks.{level}.attentions.{block}"] = f"output_blocks.{2 * level + block}.1"
    tensors = {}
    for name, tensor in unet.items():
        module, parameter = name.rsplit(".", 1)
        top = max((top for top in tops if f"{module}.".startswith(f"{top}.")), key=len)
        rest = module[len(top) + 1 :]
        rest = RESNET.get(rest, rest)
        tensors[".".join(filter(None, ("model.diffusion_model", tops[top], rest, parameter)))] = tensor
    for name, tensor in vae.items():
        for ours, theirs in [(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
                             (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}"),
                             (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
                             (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"), (r"mid_block\.attentions\.0", "mid.attn_1"),
                             ("group_norm", "norm"), ("to_out.0", "proj_out"), (r"to_([qkv])", r"\1"),
                             ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")]:  # fmt: skip
            name = re.sub(ours, theirs, name)
        tensors[f"first_stage_model.{name}"] = tensor[..., None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
    for name, tensor in clip.items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_a_single_file_is_the_same_model(models, tmp_path):
    """With a diffusers folder beside it that has no weights, and nothing from the network."""
    config = tmp_path / "config"
    shutil.copytree(models["sd"], config, ignore=shutil.ignore_patterns("*.safetensors"))
    one = PipelineModel.load(models["sd"], CPU, torch.float32)
    other = PipelineModel.load(in_one_file(models["sd"], tmp_path / "mine.safetensors"), CPU, torch.float32, config)
    index = json.loads((config / "model_index.json").read_text())
    index |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"],  # as in folders of old: there is none any more
              "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}  # fmt: skip
    (config / "model_index.json").write_text(json.dumps(index))
    again = PipelineModel.load(tmp_path / "mine.safetensors", CPU, torch.float32, config)
    assert again.pipeline.safety_checker is None
    assert other.name == "mine" and other.schedule.prediction_type == "v_prediction"
    torch.testing.assert_close(other.sample(["a cat"], 16, seed=3, steps=2), one.sample(["a cat"], 16, seed=3, steps=2))
    latents = one.encode(torch.rand(1, 3, 32, 32))
    torch.testing.assert_close(other.decode(latents), one.decode(latents))
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ModelError, match="not a diffusers folder, there is no model_index.json in it"):
            PipelineModel.load(tmp_path / "mine.safetensors", CPU, torch.float32, path)


def test_a_single_file_that_says_how_it_samples(models, tmp_path):
    """Its folder of configs is another model's, which predicts noise."""
    config = tmp_path / "config"
    shutil.copytree(models["sd"], config, ignore=shutil.ignore_patterns("*.safetensors"))
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "epsilon"}))
    path = in_one_file(models["sd"], tmp_path / "mine.safetensors")
    assert PipelineModel.load(path, CPU, torch.float32, config).schedule.prediction_type == "epsilon"
    tensors = load_file(path)
    save_file(tensors, path, {"modelspec.prediction_type": "v"})
    assert PipelineModel.load(path, CPU, torch.float32, config).schedule.prediction_type == "v_prediction"
    save_file({**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    schedule = PipelineModel.load(path, CPU, torch.float32, config).schedule
    assert schedule.prediction_type == "v_prediction" and schedule.alphas_cumprod[-1] == 0


def test_folders_as_they_are_downloaded(models, tmp_path):
    """Half-precision files only, and a safety checker in the index that is not there."""
    folder = tmp_path / "downloaded"
    shutil.copytree(models["sd"], folder)
    for file in [*folder.glob("*/*.safetensors")]:
        file.rename(file.with_suffix(".fp16.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    model = PipelineModel.load(folder, CPU, torch.float32)
    assert model.pipeline.safety_checker is None
    assert model.sample(["a cat"], 16, seed=3, steps=1).isfinite().all()


def test_what_is_no_pipeline(models, tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionInpaintPipeline", "_diffusers_version": "0.30"}'
    )
    with pytest.raises(ModelError, match="cannot be loaded|expected Stable Diffusion"):
        PipelineModel.load(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0"), ("attention", "conv")], ids=["attention", "conv"])
def test_diffusers_draws_the_same_from_a_lora(models, tmp_path, alpha, targets):
    """Its load_lora_weights on our file, beside our attach."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(models["sd"], safety_checker=None)
    adapter = Adapter.create(pipeline.unet, AdapterConfig(r=2, n_styles=1, sta="none", alpha=alpha, target_modules=targets))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.B.normal_(0, 0.5)
    save_adapter(adapter, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(400), torch.randn(2, 7, 16)
    with torch.no_grad():
        plain = pipeline.unet(*inputs).sample
        with attach(pipeline.unet, load_adapter(tmp_path / "a.safetensors")):
            ours = pipeline.unet(*inputs).sample
        pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
        theirs = pipeline.unet(*inputs).sample
    assert (ours - plain).abs().max() > 0.1 * plain.std()
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * float(plain.std()))


def config(here, path, **changes):
    """A config file for `styleinject` in a folder with three pictures."""
    (here / "pictures").mkdir(exist_ok=True)
    for k in range(3):
        Image.new("RGB", (64, 64 + 64 * (k == 2)), (80 * k, 0, 90)).save(here / "pictures" / f"{k}.png")
        (here / "pictures" / f"{k}.txt").write_text("a cat")
    values = {
        "model": {"path": str(path)},
        "data": {"folder": "pictures", "resolution": 64},
        "adapter": {"rank": 2, "styles": 2},
        "train": {"steps": 2},
        "output": {"folder": "run"},
    }
    for table, fields in changes.items():
        values.setdefault(table, {}).update(fields)
    lines = [line for table, fields in values.items() for line in
             (f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items()))]  # fmt: skip
    file = here / "c.toml"
    file.write_text("\n".join(lines))
    return str(file)


def test_what_a_model_predicts_is_part_of_a_run(models, tmp_path, capsys):
    """Mended after the fact, or in mid-run, it is another run; the config may say it."""
    assert main(["train", config(tmp_path, models["sd"])]) == 0
    said = capsys.readouterr().out
    assert "tiny-sd predicts v_prediction (its scheduler_config.json says), 1000 noise levels" in said
    assert "layers: default; captions from .txt files; sizes 3 of 64x64" in said
    adapter = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    epsilon = config(tmp_path, models["sd"], model={"prediction_type": "epsilon"})
    assert main(["train", epsilon]) == 1
    assert "sampling.prediction_type: was v_prediction, is epsilon" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == adapter
    zero = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    assert main(["train", config(tmp_path, models["sd"], model=zero)]) == 1
    assert "sampling.schedule: was" in capsys.readouterr().err
    assert main(["train", config(tmp_path, models["sd"], model=zero), "--dry-run"]) == 0
    assert "predicts v_prediction (the config says), 1000 noise levels, zero terminal SNR" in capsys.readouterr().out


def test_another_vae_and_another_text_encoder_are_another_run(models, tmp_path, capsys):
    import shutil

    for part, field in (("vae", "sampling.latents"), ("text_encoder", "sampling.encoders")):
        here = tmp_path / part
        here.mkdir()
        model = here / "model"
        shutil.copytree(models["sd"], model)
        assert main(["train", config(here, model)]) == 0
        if part == "vae":
            settings = json.loads((model / "vae" / "config.json").read_text())
            (model / "vae" / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.2}))
        else:
            file = model / "text_encoder" / "model.safetensors"
            save_file({key: value * 1.5 for key, value in load_file(file).items()}, file, {"format": "pt"})
        capsys.readouterr()
        assert main(["train", config(here, model)]) == 1
        assert f"{field}: was" in capsys.readouterr().err


def test_another_tokenizer_is_another_run(models, tmp_path, capsys):
    """The same weights read other tokens: its words changed places."""
    shutil.copytree(models["sd"], tmp_path / "model")
    assert main(["train", config(tmp_path, tmp_path / "model")]) == 0
    (file,) = (tmp_path / "model").glob("tokenizer*/tokenizer.json")
    known = json.loads(file.read_text())
    words = known["model"]["vocab"]
    words["c</w>"], words["d</w>"] = words["d</w>"], words["c</w>"]
    file.write_text(json.dumps(known))
    capsys.readouterr()
    assert main(["train", config(tmp_path, tmp_path / "model")]) == 1
    assert "sampling.encoders: was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "stated", "field"),
    [
        ("unet", {"attention_head_dim": 4}, "model"),
        ("unet", {"norm_eps": 1e-3}, "model"),
        ("text_encoder", {"hidden_act": "gelu"}, "sampling.encoders"),
        ("vae", {"norm_num_groups": 16}, "sampling.encoders"),
    ],
)
def test_what_weights_do_not_say_of_a_network_is_part_of_a_run(models, tmp_path, part, stated, field):
    """The same weights compute something else; what a config states as its class does anyhow changes nothing."""

    def plan(model):
        return {"model": model.fingerprint, "sampling.encoders": model.sampling["encoders"]}

    expected = plan(PipelineModel.load(models["sd"], CPU, torch.float32))
    shutil.copytree(models["sd"], tmp_path / "model")
    file = tmp_path / "model" / part / "config.json"
    known = json.loads(file.read_text())
    for values, differs in ((stated, {field}), ({"_name_or_path": "elsewhere"}, set())):
        file.write_text(json.dumps({**known, **values}))
        found = plan(PipelineModel.load(tmp_path / "model", CPU, torch.float32))
        assert {name for name in found if found[name] != expected[name]} == differs


def test_latents_that_a_pipeline_centers_are_centered(models, tmp_path):
    """As diffusers' own XL pipelines do where the VAE's config says so; another center is another run."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    shutil.copytree(models["xl"], tmp_path / "model")
    file = tmp_path / "model" / "vae" / "config.json"
    plain = PipelineModel.load(tmp_path / "model", CPU, torch.float32)
    stated = {"latents_mean": [0.5, -1.0, 0.1, 2.0], "latents_std": [2.0, 3.0, 0.5, 1.0]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **stated}))
    model = PipelineModel.load(tmp_path / "model", CPU, torch.float32)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = model.encode(pixels)
    parts = {
        name: part for name, part in model.pipeline.components.items() if name not in ("feature_extractor", "image_encoder")
    }
    theirs = StableDiffusionXLImg2ImgPipeline(**parts)
    expected = theirs.prepare_latents(pixels, None, 1, 1, torch.float32, CPU, None, add_noise=False)
    center, scale = torch.tensor(stated["latents_mean"]).view(1, 4, 1, 1), plain.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(
        latents.mean((2, 3)), expected.mean((2, 3)), rtol=0.5, atol=0.5
    )  # theirs draws from the posterior
    undone = latents / scale * torch.tensor(stated["latents_std"]).view(1, 4, 1, 1) + center
    torch.testing.assert_close(undone * scale, plain.encode(pixels))
    torch.testing.assert_close(model.decode(latents), plain.decode(plain.encode(pixels)), rtol=1e-4, atol=1e-4)
    assert model.sampling["latents"] != plain.sampling["latents"]


def test_class_images_of_another_prediction_are_drawn_anew(models, tmp_path):
    tables = {"instance_prompt": "a zwx cat", "class_prompt": "a cat", "class_images": 2, "class_steps": 2}
    for k, prediction in enumerate(("v_prediction", "epsilon")):
        path = config(
            tmp_path, models["sd"], dreambooth=tables, model={"prediction_type": prediction}, output={"folder": "run"}
        )
        main(["dreambooth", path])
        assert len(list((tmp_path / "run").glob("generated-*.latents"))) == k + 1


def test_sdxl_is_told_the_size_and_the_crop(models, tmp_path):
    """The size of the file and what was cut off, as its authors trained it; at captions that are dropped too."""
    model = PipelineModel.load(models["xl"], CPU, torch.float32)
    (tmp_path / "data").mkdir()
    Image.new("RGB", (300, 100)).save(tmp_path / "data" / "a.png")
    folder = ImageFolder(tmp_path / "data", 64, buckets=False, caption="a cat")
    source = FolderSource(
        folder, model.encode, lambda text: model.encode_text([text]), size_conditioning=model.size_conditioning
    )
    seen = []
    model.denoiser.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True
    )
    for dropout in (0.0, 1.0):
        task = FineTune(model, source, TrainSettings(caption_dropout=dropout), model.encode_text([""]))
        task.loss(RandomNumbers(0, 0))
    assert seen == [[[100, 300, 0, 64, 64, 64]]] * 2
    drawn = LatentSource([torch.zeros(4, 8, 16)], model.encode_text(["a cat"]))  # by the model: whole, of its own size
    FineTune(model, drawn, TrainSettings()).loss(RandomNumbers(0, 0))
    side = model.pixels_per_latent
    assert seen[2] == [[8 * side, 16 * side, 0, 0, 8 * side, 16 * side]]


def test_a_vae_that_makes_nan_is_named(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PipelineModel, "encode", lambda self, pixels: torch.full((1, 4, 32, 32), float("nan")))
    assert main(["train", config(tmp_path, models["sd"])]) == 1
    said = capsys.readouterr().err
    assert ".png: the VAE makes NaN" in said and "model.dtype" in said and "learning rate" not in said


def test_pictures_that_cannot_be_drawn_end_no_run(models, tmp_path, capsys, monkeypatch):
    """One at a time, beside a training; without memory for even one it goes on."""
    asked, draw = [], PipelineModel.sample

    def sample(self, prompts, *args, **named):
        asked.append(list(prompts))
        if len(asked) == 2:  # the second prompt of the first step: what was drawn before is kept
            return draw(self, prompts, *args, **named)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(PipelineModel, "sample", sample)
    path = config(tmp_path, models["sd"], train={"sample_every": 1}, output={"prompts": ["a cat", "a dog"]})
    asked.append("none")
    assert main(["train", path]) == 0
    assert asked == ["none", ["a cat"], ["a dog"], ["a cat"]]
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
    assert [file.name for file in (tmp_path / "run" / "samples").iterdir()] == ["step-000001.png"]
    with Image.open(tmp_path / "run" / "samples" / "step-000001.png") as row:
        assert row.width == row.height, "the first prompt's alone"
    said = capsys.readouterr()
    assert "pictures of step 1: CUDA out of memory" in said.out + said.err


def test_pictures_of_nan_are_called_so(models, tmp_path, capsys, monkeypatch):
    """They would be black, and nobody would know why."""
    decode, calls = PipelineModel.decode, iter(range(9))

    def broken(self, latents):
        return decode(self, latents) * (float("nan") if next(calls) % 2 else 1)

    monkeypatch.setattr(PipelineModel, "decode", broken)
    path = config(tmp_path, models["sd"], train={"sample_every": 2}, output={"prompts": ["a cat", "a dog"]})
    assert main(["train", path]) == 0
    said = capsys.readouterr()
    assert "pictures of step 2: 1 of 2 (number 2) came out as NaN or infinite" in said.out + said.err
    with Image.open(tmp_path / "run" / "samples" / "step-000002.png") as row:
        half = row.width // 2
        assert row.crop((half, 0, row.width, row.height)).getextrema() == ((0, 0),) * 3
        assert row.crop((0, 0, half, row.height)).getextrema() != ((0, 0),) * 3


def test_class_images_that_do_not_fit_together_are_drawn_one_by_one(models, tmp_path, monkeypatch):
    sample, asked = PipelineModel.sample, []

    def little(self, prompts, *args, **named):
        asked.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(self, prompts, *args, **named)

    monkeypatch.setattr(PipelineModel, "sample", little)
    tables = {"instance_prompt": "a zwx cat", "class_prompt": "a cat", "class_images": 2, "class_steps": 1}
    assert main(["dreambooth", config(tmp_path, models["sd"], dreambooth=tables)]) == 0
    assert asked == [2, 1, 1]


def test_captions_beyond_what_is_read_are_counted(models, tmp_path, capsys):
    path = config(tmp_path, models["sd"])
    (tmp_path / "pictures" / "1.txt").write_text("a b c d e f g h i j k l m n o p q r s t")
    assert main(["train", path, "--dry-run"]) == 0
    assert "1 of 3 captions are longer than the 16 tokens" in capsys.readouterr().out


def test_captions_of_a_stream_beyond_what_is_read_are_counted() -> None:
    """As they are read: nobody knows before how many there are. Said of the first, the tenth, the hundredth..."""

    class Stream:
        def next_batch(self) -> list[Example]:
            return [Example(torch.zeros(3, 8, 8), caption, "a") for caption in ("a b c", "short")]

    said: list[str] = []
    source = StreamSource(
        Stream(), lambda pixels: pixels, lambda text: {"context": torch.zeros(1, 1, 2)},
        length=lambda caption: (len(caption.split()), 2), warn=said.append,
    )  # fmt: skip
    for index in range(25):
        source.batch(index)
    assert [line[:36] for line in said] == ["1 of 1 captions read so far are long", "10 of 19 captions read so far are lo"]
    assert "the 2 tokens" in said[0] and "this one: 3" in said[0]


def test_empty_captions_of_a_stream_are_counted() -> None:
    class Stream:
        def next_batch(self) -> list[Example]:
            return [Example(torch.zeros(3, 8, 8), caption, "a") for caption in ("a b c", "")]

    said: list[str] = []
    source = StreamSource(Stream(), lambda x: x, lambda text: {"context": torch.zeros(1, 1, 2)}, warn=said.append)
    for index in range(12):
        source.batch(index)
    assert said == ["1 of 2 captions read so far are empty", "10 of 20 captions read so far are empty"]
