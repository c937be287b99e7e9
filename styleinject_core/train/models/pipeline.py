"""Stable Diffusion models from diffusers as training wants them: a local folder, or a single checkpoint file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.batches import Conditioning, rows, tensors_hash
from ..data.buckets import Size
from .noise import DiscreteSchedule
from .training_model import TextToImageModel

_ARCHITECTURES = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-512", 2048: "stable-diffusion-xl-v1-base"}


_NOT_THE_NETWORK = ("transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")  # of a config
_SIGNS = [chr(code) for code in range(33, 127)]
_EVERY_SIGN = "".join(_SIGNS) + " ".join([*_SIGNS, "a photo of the quick brown fox, caf\u00e9, \u732b"])


class ModelError(ValueError):
    """A model that cannot be loaded or trained; the message names it, and what was expected."""


class PipelineModel(TextToImageModel):
    """A StableDiffusionPipeline or StableDiffusionXLPipeline, frozen.

    Args:
        pipeline: on its device, in its dtype.
        name: what to call it.
        stated_by: who says what it predicts.
    """

    def __init__(self, pipeline: Any, name: str, stated_by: str = "its scheduler_config.json"):
        unet = pipeline.unet.requires_grad_(False).eval()
        super().__init__(unet, DiscreteSchedule.from_diffusers(pipeline.scheduler.config), name)
        pipeline.vae.requires_grad_(False).eval()
        if pipeline.vae.dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
            pipeline.vae.to(torch.float32)  # SDXL's overflows in float16
        self.pipeline, self._spared, self._stated_by = pipeline, False, stated_by
        self.is_xl = getattr(pipeline, "text_encoder_2", None) is not None
        self.architecture = _ARCHITECTURES.get(unet.config.cross_attention_dim, "unknown")
        self.pixels_per_latent = pipeline.vae_scale_factor

    @classmethod
    def load(
        cls,
        path: Path,
        device: torch.device,
        dtype: torch.dtype,
        config: Path | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> PipelineModel:
        """Load a model; nothing is downloaded.

        Args:
            path: a diffusers folder (with model_index.json), or a .safetensors checkpoint.
            config: for a checkpoint file, a diffusers folder of the same kind of model, for its tokenizer and configs.
            sampling: what is known better than its files say it, as fields of a diffusers scheduler's config.

        Raises:
            ModelError: no such file, not safetensors, or another kind of model.
            ImportError: diffusers is not installed.
        """
        try:
            from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
        except ImportError as error:
            raise ImportError("training Stable Diffusion models needs packages: pip install diffusers transformers") from error
        if not path.exists():
            raise ModelError(f"model {path}: no such file or folder")
        stated_by = "its scheduler_config.json" if path.is_dir() else "the scheduler_config.json of model.config"
        options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
        try:
            if path.is_dir():
                pipeline = DiffusionPipeline.from_pretrained(path, use_safetensors=True, **options, **_of_folder(path))
            elif path.suffix != ".safetensors":
                raise ModelError(f"model {path.name}: expected a diffusers folder or a .safetensors file")
            else:
                if config is None:
                    raise ModelError(
                        f"model {path.name}: a single file has no tokenizer; set model.config to a diffusers folder "
                        "of its kind (docs/training.md says where to get one)"
                    )
                if not (config / "model_index.json").is_file():  # diffusers would look for it in the network
                    raise ModelError(f"model.config {config}: not a diffusers folder, there is no model_index.json in it")
                kind = StableDiffusionXLPipeline if (config / "text_encoder_2").is_dir() else StableDiffusionPipeline
                unused = {"safety_checker": None, "feature_extractor": None}
                stated = sampling_of_file(path)
                pipeline = kind.from_single_file(str(path), config=str(config), **unused, **options)
                if stated:
                    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **stated)
                    stated_by = "the file itself"
            if sampling:
                pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **sampling)
                stated_by = "the config"
        except (ModelError, MemoryError):
            raise
        except Exception as error:  # of damaged files diffusers and transformers raise anything
            raise ModelError(f"model {path.name}: cannot be loaded: {str(error)[:1000] or type(error).__name__}") from error
        if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
            raise ModelError(
                f"model {path.name}: expected Stable Diffusion 1.x, 2.x or XL, found a {type(pipeline).__name__}; "
                "other models are trained in ComfyUI"
            )
        return cls(pipeline.to(device), path.name if path.is_dir() else path.stem, stated_by)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device  # type: ignore[return-value]

    @property
    def may_be_bfloat16(self) -> bool:  # type: ignore[override]
        return self.dtype == torch.float32 and self.device.type == "cuda" and torch.cuda.is_bf16_supported()

    def spare_encoders(self) -> None:
        self._spared = True
        for encoder in self.encoders():
            encoder.to("cpu")

    def encoders(self) -> list[Any]:
        names = ("vae", "text_encoder", "text_encoder_2")
        return [encoder for name in names if (encoder := getattr(self.pipeline, name, None)) is not None]

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """The encoders on the model's device."""
        try:
            for encoder in self.encoders():
                encoder.to(self.device)
            yield
        finally:
            if self._spared:
                self.spare_encoders()

    @cached_property
    def fingerprint(self) -> str:
        """The weights, and what their numbers do not say of the network, as its heads."""
        return tensors_hash([super().fingerprint, _stated(self.denoiser)])

    def reading(self) -> list[Any]:
        tokenizers = [getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
        tokens = [[t.model_max_length, t(_EVERY_SIGN, verbose=False).input_ids] for t in tokenizers if t is not None]
        return [*tokens, *map(_stated, self.encoders())]

    @property
    def latent_space(self) -> tuple[Any, ...]:
        config = self.pipeline.vae.config
        shifted = (tuple(config.latents_mean), tuple(config.latents_std)) if self._shift is not None else ()
        return config.latent_channels, config.scaling_factor, self.pixels_per_latent, *shifted

    @property
    def _shift(self) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of latents, (1, C, 1, 1) each, where the pipeline brings them to 0 and 1: some of SDXL's kind."""
        config = self.pipeline.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if not self.is_xl or mean is None or deviation is None:
            return None
        return torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(deviation).view(1, -1, 1, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype  # type: ignore[return-value]

    def predict(self, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        embeddings = {key: value.to(self.device, self.dtype) for key, value in conditioning.items()}
        added = None
        if self.is_xl:
            size = (noisy.shape[-2] * self.pixels_per_latent, noisy.shape[-1] * self.pixels_per_latent)
            whole = self.size_conditioning(size, (0, 0), size)["size"]  # of images that the model itself drew
            ids = embeddings.get("size", whole.to(self.device, self.dtype).expand(len(noisy), -1))
            added = {"text_embeds": embeddings["pooled"], "time_ids": ids}
        noisy, times = noisy.to(self.device, self.dtype), times.to(self.device)
        return self.denoiser(noisy, times, embeddings["context"], added_cond_kwargs=added).sample

    @property
    def about(self) -> str:
        schedule = self.schedule
        assert isinstance(schedule, DiscreteSchedule)
        last = float(schedule.alphas_cumprod[-1])
        noise = "zero terminal SNR" if last < 1e-6 else f"signal {last:.4f} at the last"
        return (
            f"predicts {schedule.prediction_type} ({self._stated_by} says), {len(schedule.alphas_cumprod)} noise levels, "
            f"{noise}; latents times {self.pipeline.vae.config.scaling_factor:g}"
        )

    def size_conditioning(self, original: Size, crop: Size, size: Size) -> Conditioning:
        """SDXL's: the size before any scaling, the crop's top and left after it, and the size (arXiv 2307.01952, 2.2)."""
        return {"size": torch.tensor([[*original, *crop, *size]], dtype=torch.float32)} if self.is_xl else {}

    def length(self, caption: str) -> tuple[int, int]:
        tokenizer = self.pipeline.tokenizer
        return len(tokenizer(caption, verbose=False).input_ids), tokenizer.model_max_length

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        with self._encoding():
            mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        latents = mean.float()
        if self._shift is not None:
            center, deviation = (part.to(latents) for part in self._shift)
            latents = (latents - center) / deviation
        return latents * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        with self._encoding():
            latents = latents.float() / vae.config.scaling_factor
            if self._shift is not None:
                center, deviation = (part.to(latents) for part in self._shift)
                latents = latents * deviation + center
            pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
        return pixels.float().clamp(-1, 1).cpu()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        with self._encoding():
            encoded = self.pipeline.encode_prompt(
                list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        conditioning = {"context": encoded[0].cpu()}
        if self.is_xl:
            conditioning["pooled"] = encoded[2].cpu()
        return conditioning

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], resolution: int, seed: int, steps: int = 20, guidance: float = 5.0) -> Tensor:
        from diffusers import DPMSolverMultistepScheduler

        prompt, empty = self.encode_text(prompts), rows(self.encode_text([""]), [0] * len(prompts))
        embeddings = {"prompt_embeds": prompt["context"], "negative_prompt_embeds": empty["context"]}
        if self.is_xl:
            embeddings |= {"pooled_prompt_embeds": prompt["pooled"], "negative_pooled_prompt_embeds": empty["pooled"]}
        former = self.pipeline.scheduler
        self.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(former.config)
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            return self.pipeline(
                **{key: value.to(self.device, self.dtype) for key, value in embeddings.items()},
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed + k) for k in range(len(prompts))],
                output_type="latent",
            ).images.float()
        finally:
            self.pipeline.scheduler = former


def _stated(network: Any) -> dict[str, str]:
    """What a network's config states beside its class's defaults, which later versions of a library may add to."""
    config = network.config
    if hasattr(config, "to_diff_dict"):  # of transformers
        stated = config.to_diff_dict()
    else:
        defaults = {name: parameter.default for name, parameter in inspect.signature(type(network).__init__).parameters.items()}
        stated = {
            name: value for name, value in config.items() if name not in defaults or _plain(defaults[name]) != _plain(value)
        }
    return {
        name: repr(_plain(value)) for name, value in stated.items() if not name.startswith("_") and name not in _NOT_THE_NETWORK
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def sampling_of_file(path: Path) -> dict[str, Any]:
    """What a checkpoint file says about its own schedule, in diffusers' words: some v-prediction models are marked so.

    Raises:
        ModelError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys, stated = set(file.keys()), (file.metadata() or {}).get("modelspec.prediction_type", "")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model {path.name}: damaged, or not a whole safetensors file ({str(error)[:300]})") from error
    if "v_pred" not in keys and stated not in ("v", "v_prediction"):
        return {}
    zero_terminal = {"rescale_betas_zero_snr": True} if "ztsnr" in keys else {}
    return {"prediction_type": "v_prediction", **zero_terminal}


def _of_folder(folder: Path) -> dict[str, Any]:
    """How to load a diffusers folder: without a safety checker, and half-precision files where it has no others."""
    options: dict[str, Any] = {}
    index = folder / "model_index.json"
    if index.is_file() and "safety_checker" in index.read_text(encoding="utf-8"):
        options["safety_checker"] = None
    weights = [file.name for file in (folder / "unet").glob("*.safetensors")]
    if weights and all(re.search(r"\.fp16[.-]", name) for name in weights):
        options["variant"] = "fp16"
    return options
