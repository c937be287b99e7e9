"""`styleinject deadiff train`: a DEADiff for a frozen model, from pictures sorted by style and named after what they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..deadiff import SD15, Deadiff, load_deadiff, load_vision, save_deadiff
from ..deadiff.blip_diffusion import start_from_blip_diffusion
from ..deadiff.config import DEMO_ENCODER
from ..demo.deadiff import DEMO_CONFIG, FIVE_STYLES, five_style_training, new_deadiff
from ..demo.features import demo_features
from ..train.data.batches import weights_hash
from ..train.data.images import View, decode
from ..train.data.pairs import Picture, pictures_in_folder, pictures_in_shards
from ..train.data.source import check_latents
from ..train.models.training_model import TextToImageModel
from ..train.objectives.reference import TASKS, PairedImages, ReferenceTask, Shares, align, start_from_host
from ..train.parallel import Processes, launched_processes
from ..train.run.loop import Result, train
from ..train.run.reference_folder import ReferenceFolder
from ..train.run.watch import ProgressBar, loss_plot
from ..train.settings import TrainSettings, about
from .build import load_model, make_folder, output_folder
from .config_files import ConfigError, ModelTable, OutputTable, load_config

_CONFIGS = {config.base: config for config in (SD15, DEMO_CONFIG)}
_AT_ONCE = 8  # images that are encoded together


@dataclass(frozen=True)
class PairsTable:
    """Pictures of which it is known in which style they are and what they show."""

    folder: str = field(
        default="", metadata=about("a folder for each style, with pictures named after what they show (see docs/deadiff.md).")
    )
    shards: str = field(default="", metadata=about('or such folders as WebDataset shards, as in "pairs-{000..009}.tar".'))
    resolution: int = field(default=512, metadata=about("pixels of the targets' sides; they are cropped to squares."))
    validation: int = field(
        default=0, metadata=about("how many subjects are held out, in every style, for the validation loss; at least 2.")
    )

    def __post_init__(self) -> None:
        if bool(self.folder) == bool(self.shards):
            raise ValueError("folder and shards: give one of them")
        if self.resolution < 1 or self.validation < 0 or self.validation == 1:
            raise ValueError(
                f"resolution {self.resolution}, validation {self.validation}: expected at least 1, and 0 or at least 2"
            )


@dataclass(frozen=True)
class DeadiffTable:
    """What is trained, and how often each task comes."""

    start: str = field(default="", metadata=about("a DEADiff file to go on from; left empty, everything begins anew."))
    blip_diffusion: str = field(
        default="",
        metadata=about("a Q-Former of BLIP-Diffusion (.safetensors) that both streams begin with, where start is empty."),
    )
    vision: str = field(
        default="",
        metadata=about("a DEADiff file with the vision encoder inside (convert --with-vision), where start has none."),
    )
    style: float = field(default=1.0, metadata=about("share of same-style pairs."))
    content: float = field(default=1.0, metadata=about("share of same-subject pairs."))
    reconstruction: float = field(
        default=1.0, metadata=about("share of images that are their own reference; brings colors along.")
    )
    align_steps: int = field(
        default=0,
        metadata=about(
            "steps that first bring the content tokens to the text encoder's output; the content stream does not start\n"
            "without them, or without pretrained weights."
        ),
    )
    dropout: float = field(
        default=0.0, metadata=about("share of targets with empty tokens; nothing is learned from them (the authors have 0.15).")
    )

    def __post_init__(self) -> None:
        self.shares()
        if self.start and self.blip_diffusion:
            raise ValueError("start, blip_diffusion: a DEADiff has Q-Formers already, give one of the two")
        if self.align_steps < 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"align_steps {self.align_steps}, dropout {self.dropout}: expected at least 0, and 0 to below 1")

    def shares(self) -> Shares:
        return Shares(*(getattr(self, task) for task in TASKS))


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """`styleinject deadiff train`: style and content from a reference image, for a frozen model."""

    model: ModelTable
    data: PairsTable
    output: OutputTable
    deadiff: DeadiffTable = field(default_factory=DeadiffTable)
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        if self.train.validate_every and not self.data.validation:
            raise ValueError("train.validate_every: set data.validation to how many subjects are held out for it")
        if self.train.gradient_checkpointing or self.train.sample_every or self.output.prompts:
            raise ValueError(
                "train.gradient_checkpointing, train.sample_every, output.prompts: not in the training of a DEADiff"
            )


def run(path: Path, dry: bool = False) -> Result | None:
    """Run a config file, from where its last run stopped; with `dry`, print the plan and train nothing.

    Raises:
        ConfigError, DataError, DeadiffFileError, ModelError, and what `train` raises.
    """
    config, here, processes = load_config(ReferenceConfig, path), path.parent, launched_processes()
    out = output_folder(here, config.output, {"data.folder": config.data.folder})
    model = _model(config.model, here)
    data = config.data
    pictures = pictures_in_folder(here / data.folder) if data.folder else pictures_in_shards(here / data.shards)
    shown, held_out = _split(pictures, config.data.validation)
    deadiff = _start(config, here, model)
    encode = _encoder(config, here, deadiff)
    if processes.is_main and not dry:  # encoding and aligning take their time
        make_folder(out, config.output, config.train.steps)
    processes.wait()
    images = read_images(model, shown, config.data.resolution, encode)
    validation = read_images(model, held_out, config.data.resolution, encode) if held_out else None
    task = ReferenceTask(
        model,
        images,
        config.train,
        config.deadiff.shares(),
        validation=validation,
        dropout=config.deadiff.dropout,
        begins=f"{weights_hash(deadiff.parameters())}, aligned for {config.deadiff.align_steps} steps",
    )
    if processes.is_main:
        print(_heading(config, model, deadiff, shown, held_out))
    if dry:
        return None
    return _train(config, out, model, deadiff, task, processes)


def _train(
    config: ReferenceConfig, out: Path, model: TextToImageModel, deadiff: Deadiff, task: ReferenceTask, processes: Processes
) -> Result:
    written = {key: getattr(config.output, key) for key in ("title", "author", "description", "license")}
    metadata = {f"modelspec.{key}": value for key, value in written.items() if value} | {"deadiff_base": model.name}
    folder = ReferenceFolder(out, metadata, getattr(torch, config.output.dtype), config.output.name)
    if config.deadiff.align_steps and not folder.has_state:
        texts = task.images.subject_prompts
        name = next(key for key, value in texts.items() if value.ndim == 3)
        error = align(deadiff, task.images.features, texts[name], steps=config.deadiff.align_steps, seed=config.train.seed)
        if processes.is_main:
            print(f"content tokens aligned with the text: mean squared error {error:.4f} of {float(texts[name].var()):.4f}")
    with ProgressBar(config.train.steps) as bar:
        result = train(deadiff, task, config.train, run=folder, observer=bar, processes=processes)  # type: ignore[arg-type]
    if processes.is_main:
        final = folder.final_file
        out.mkdir(parents=True, exist_ok=True)
        step = result.best_step or result.step
        save_deadiff(deadiff, final, {**metadata, "deadiff_steps": str(step)}, getattr(torch, config.output.dtype))
        loss_plot(out / "loss.png", f"{config.output.name}: DEADiff", result.losses, result.validation)
        print(f"{final.name}: step {step}, in {out}")
    processes.wait()
    return result


def _model(table: ModelTable, here: Path) -> TextToImageModel:
    return five_style_training() if table.path == f"demo:{FIVE_STYLES}" else load_model(table, here)


def _start(config: ReferenceConfig, here: Path, model: TextToImageModel) -> Deadiff:
    """The DEADiff that is trained, float32. Raises ConfigError: none is known for this kind of model."""
    if config.deadiff.start:
        deadiff = load_deadiff(here / config.deadiff.start).float()
        if deadiff.config.base != model.architecture:
            raise ConfigError(f"deadiff.start: made for {deadiff.config.base}, this model is {model.architecture}")
    elif model.architecture in _CONFIGS:
        deadiff = new_deadiff(_CONFIGS[model.architecture], config.train.seed, config.output.name)
        start_from_host(deadiff, model.denoiser)
        if config.deadiff.blip_diffusion:
            start_from_blip_diffusion(deadiff, here / config.deadiff.blip_diffusion)
    else:
        raise ConfigError(f"model.path: a DEADiff is for {' or '.join(_CONFIGS)}, this model is {model.architecture}")
    return deadiff.to(model.device).requires_grad_(True).train()


def _encoder(config: ReferenceConfig, here: Path, deadiff: Deadiff) -> Callable[[Tensor], Tensor]:
    """From images (R, H, W, 3) in [0, 1] to features. Raises ConfigError: there is no vision encoder."""
    if deadiff.config.encoder == DEMO_ENCODER:
        return demo_features
    for file in (config.deadiff.vision, config.deadiff.start):
        tower = load_vision(here / file) if file else None
        if tower is not None:
            if deadiff.class_embedding is not None:
                deadiff.class_embedding.copy_(tower.class_embedding)
            return tower.to(next(deadiff.parameters()).device).features
    raise ConfigError("deadiff.vision: a DEADiff file with the vision encoder inside is needed, converted --with-vision")


@torch.no_grad()
def read_images(
    model: TextToImageModel, pictures: Sequence[Picture], resolution: int, encode: Callable[[Tensor], Tensor]
) -> PairedImages:
    """The pictures as training wants them: latents, features and prompts, all in memory.

    Raises:
        DataError: a picture that cannot be decoded, or that the VAE makes NaN of.
    """
    latents, features = [], []
    for first in range(0, len(pictures), _AT_ONCE):
        pixels = []
        for picture in pictures[first : first + _AT_ONCE]:
            pixels.append(decode(picture.open(), picture.name, (resolution, resolution), View()))
        batch = torch.stack(pixels)  # (b, 3, H, W)
        latents.append(model.encode(batch.to(model.device)).float().cpu())
        for picture, latent in zip(pictures[first:], latents[-1], strict=False):
            check_latents(picture.name, latent)
        features.append(encode((batch.movedim(1, -1) + 1) / 2).float().cpu())
    return PairedImages(
        torch.cat(latents),
        torch.cat(features),
        [picture.style for picture in pictures],
        [picture.subject for picture in pictures],
        model.encode_text([picture.subject_prompt for picture in pictures]),
        model.encode_text([picture.style_prompt for picture in pictures]),
        model.encode_text([""]),
    )


def _split(pictures: Sequence[Picture], validation: int) -> tuple[list[Picture], list[Picture]]:
    """The pictures that are trained on, and those of evenly chosen subjects that are held out."""
    subjects = sorted({picture.subject for picture in pictures})
    if validation >= len(subjects):
        raise ConfigError(f"data.validation: {validation} of {len(subjects)} subjects leave none to train on")
    held = {subjects[k * len(subjects) // validation] for k in range(validation)}
    return [p for p in pictures if p.subject not in held], [p for p in pictures if p.subject in held]


def _heading(
    config: ReferenceConfig, model: TextToImageModel, deadiff: Deadiff, shown: Sequence[Picture], held_out: Sequence[Picture]
) -> str:
    styles, subjects = ({getattr(p, label) for p in shown} for label in ("style", "subject"))
    held = f", {len(held_out)} held out" if held_out else ""
    return (
        f"DEADiff on {config.model.path}: {len(shown)} pictures in {len(styles)} styles of {len(subjects)} subjects{held}; "
        f"{deadiff.counts()['all']:,} parameters, {config.train.batch_size} images a step, {config.train.steps} steps"
        f"\n{model.name} {model.about}"
    )
