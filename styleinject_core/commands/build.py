"""From a config to what the loop takes: model, adapter, task."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..demo.training import DemoTrainingModel
from ..train.data.batches import Conditioning, joined
from ..train.data.captions import decoded, one_line
from ..train.data.drawn import draw_once, kept_latents
from ..train.data.folder import ImageFolder
from ..train.data.kept import Kept
from ..train.data.labels import StyleLabels
from ..train.data.source import FolderSource, LatentSource, Source, StreamSource, too_long
from ..train.data.webdataset import ImageStream
from ..train.memory import Choice, Workload, choose, free_memory, is_out_of_memory, prompt_features
from ..train.models.pipeline import PipelineModel
from ..train.models.training_model import TextToImageModel
from ..train.objectives.tasks import Distil, DreamBooth, FineTune, check_teacher, check_weights_differ
from ..train.parallel import Processes, launched_device
from ..train.request import TrainingRequest
from ..train.run.checkpoints import RunFolder
from ..train.run.metadata import made_by
from ..train.settings import MEMORY_OFF
from .config_files import ConfigError, DataTable, DistilConfig, DreamBoothConfig, ModelTable, OutputTable, TrainConfig

DEMO = "demo"
ENCODED = "encoded"  # in the run's folder: what does not fit in memory, while it trains
_AT_ONCE = 4  # images that a model draws before training


@dataclass
class Job:
    """A run that is ready to start.

    Args:
        out: the run's folder, which exists.
        memory: what was chosen to make it fit, in words.
    """

    config: TrainConfig
    request: TrainingRequest
    out: Path
    processes: Processes
    model: TextToImageModel
    adapter: Adapter
    task: FineTune
    memory: str = ""

    def metadata(self) -> dict[str, str]:
        """How the adapter was made, for its file: ModelSpec fields and our own, no paths."""
        config = self.config
        teacher = config.teacher.path if isinstance(config, DistilConfig) else ""
        metadata = made_by(
            self.task,
            config.train,
            architecture=self.model.architecture,
            method=config.adapter.method,
            base=self.model.name,
            teacher=Path(teacher).stem,
        )
        metadata["modelspec.resolution"] = f"{config.data.resolution}x{config.data.resolution}"
        if isinstance(config, DreamBoothConfig):
            metadata["modelspec.trigger_phrase"] = config.dreambooth.instance_prompt
        written = {"title": config.output.title or config.output.name}
        written |= {key: getattr(config.output, key) for key in ("author", "description", "license", "trigger_phrase")}
        return metadata | {f"modelspec.{key}": value for key, value in written.items() if value}


def build(config: TrainConfig, here: Path, processes: Processes, dry: bool = False) -> Job:
    """Load the model and the data, and make an untrained adapter.

    Args:
        dry: write nothing, and put noise in the place of images that a model would have to draw first.

    Raises:
        ConfigError, ModelError, DataError, SelectorError: what does not fit; names it.
    """
    class_folder = config.dreambooth.class_folder if isinstance(config, DreamBoothConfig) else ""
    out = output_folder(here, config.output, {"data.folder": config.data.folder, "dreambooth.class_folder": class_folder})
    if processes.is_main and not dry:
        make_folder(out, config.output, config.train.steps)  # images may be drawn for an hour first
    processes.wait()
    model = load_model(config.model, here)
    if config.data.resolution % model.pixels_per_latent:
        raise ConfigError(f"data.resolution: expected a multiple of {model.pixels_per_latent}, found {config.data.resolution}")
    teacher = load_model(config.teacher, here) if isinstance(config, DistilConfig) else None
    choice = _fitted(config, model, teacher, RunFolder(out).chosen_before() if out.is_dir() else {})
    config = replace(config, train=choice.request.settings, adapter=choice.request.adapter)
    task = _task(config, here, None if dry else out, model, teacher, processes)
    adapter = choice.request.new_adapter(model.denoiser, prompt_features(model, model.encode_text([""])))
    if config.data.styles:
        adapter = adapter.with_style_names(config.data.styles)
    return Job(config, choice.request, out, processes, model, adapter.to(model.device), task, choice.report)


def output_folder(here: Path, output: OutputTable, data: Mapping[str, str]) -> Path:
    """Where a run writes.

    Args:
        data: the fields that name folders of images, and what they name.

    Raises:
        ConfigError: its parent is missing, or it is inside of such a folder.
    """
    out = here / output.folder
    if not out.parent.is_dir():
        raise ConfigError(f"output.folder: {out.parent.name!r} is not a folder, create it first")
    for name, folder in data.items():
        if folder and out.resolve().is_relative_to((here / folder).resolve()):
            raise ConfigError(f"output.folder: it is inside {name}, where the run's pictures would be taken for data")
    return out


def make_folder(out: Path, output: OutputTable, steps: int) -> None:
    """Make a run's folder, and try what the run will write.

    Raises:
        ConfigError: it cannot be made.
        WriteError: it refuses one of the files.
    """
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.folder: {str(out)[-200:]} cannot be made: {error.strerror}") from None
    RunFolder(out, name=output.name).try_writing(0, steps)


def _fitted(config: TrainConfig, model: TextToImageModel, teacher: TextToImageModel | None, previous: dict[str, Any]) -> Choice:
    """What the config's memory choice chooses; the models are brought to the dtype it asks for."""
    models = [model] if teacher is None else [model, teacher]
    side = config.data.resolution // model.pixels_per_latent
    channels = model.encode(torch.zeros(1, 3, 64, 64)).shape[1]
    work = Workload(
        model,
        config.request(),
        (channels, side, side),
        model.encode_text([""]),
        teacher=teacher,
        passes=2 if isinstance(config, DreamBoothConfig) and config.dreambooth.prior_weight > 0 else 1,
        features=isinstance(config, DistilConfig) and config.distil.features > 0,
        may_checkpoint=bool(model.blocks()),
        casts=all(m.may_be_bfloat16 for m in models),
    )
    if config.train.memory != MEMORY_OFF:
        for each in models:
            each.spare_encoders()
    choice = choose(work, free_memory(model.device) + (work.weights() if model.device.type == "cpu" else 0), previous)
    if choice.dtype is not None:
        for each in models:
            each.denoiser.to(choice.dtype)
    return choice


def load_model(table: ModelTable, here: Path) -> TextToImageModel:
    """The model of a config. Raises ModelError, ValueError."""
    if table.path == DEMO or table.path.startswith(f"{DEMO}:"):
        if table.sampling():
            raise ConfigError("model.prediction_type, model.zero_terminal_snr: the embedded model's are known")
        _, _, style = table.path.partition(":")
        return DemoTrainingModel.load(style) if style else DemoTrainingModel.load()
    config = here / table.config if table.config else None
    dtype = getattr(torch, table.dtype)
    return PipelineModel.load(here / table.path, launched_device(), dtype, config, table.sampling())


def _task(
    config: TrainConfig,
    here: Path,
    out: Path | None,
    model: TextToImageModel,
    teacher: TextToImageModel | None,
    processes: Processes,
) -> FineTune:
    if isinstance(config, DistilConfig):
        assert teacher is not None
        return _distillation(config, here, out, model, teacher, processes)
    settings, empty = config.train, model.encode_text([""])
    if isinstance(config, DreamBoothConfig):
        table = config.dreambooth
        kept = _kept(config, out, model)
        source, validation = _images(config, here, model, processes, caption=table.instance_prompt, kept=kept)
        prior = _prior(config, here, out, model, processes, kept)
        return DreamBooth(model, source, settings, empty, prior=prior, prior_weight=table.prior_weight, **validation)
    source, validation = _images(config, here, model, processes, kept=_kept(config, out, model))
    return FineTune(model, source, settings, empty, style_dropout=config.data.style_dropout, **validation)


def _distillation(
    config: DistilConfig,
    here: Path,
    out: Path | None,
    model: TextToImageModel,
    teacher: TextToImageModel,
    processes: Processes,
) -> Distil:
    table = config.distil
    _check_teacher(model, teacher, table.shared_text_encoder)
    pairs = _prompt_pairs(config, here)

    def read_by_teacher(caption: str) -> Conditioning:
        return teacher.encode_text([_translated(pairs, caption)])

    its_reader = None if table.shared_text_encoder else read_by_teacher
    validation: dict[str, Any] = {}
    source: Source
    if config.data.folder or config.data.shards:
        kept = _kept(config, out, model, teacher.sampling, table.shared_text_encoder, pairs)
        source, validation = _images(config, here, model, processes, encode_teacher_text=its_reader, kept=kept)
    else:
        prompts = [prompt for prompt in pairs for _ in range(table.images_per_prompt)]
        translated = [pairs[prompt] for prompt in prompts]
        latents = _generated(config, out, teacher, translated, table.sampling_steps, table.guidance, processes)
        conditioning = joined([model.encode_text([p]) for p in prompts])
        its_conditioning = None if its_reader is None else joined([its_reader(p) for p in prompts])
        source = _latents(config, latents, conditioning, processes, its_conditioning)
    return Distil(
        model,
        teacher,
        source,
        config.train,
        model.encode_text([""]),
        None if table.shared_text_encoder else teacher.encode_text([""]),
        style_dropout=config.data.style_dropout,
        output_weight=table.output_weight,
        feature_weight=table.features,
        teacher_reads="the student's prompts" if table.shared_text_encoder else f"its own, {_hash(pairs)}",
        **validation,
    )


def _kept(config: TrainConfig, out: Path | None, model: TextToImageModel, *also: Any) -> Kept:
    """Where latents and captions are kept, for these encoders."""
    identity = _hash([model.sampling, config.model.dtype, *also])
    return Kept(None if out is None else out / ENCODED, identity, problem=lambda line: warnings.warn(line, stacklevel=2))


def _images(
    config: TrainConfig, here: Path, model: TextToImageModel, processes: Processes, caption: str | None = None, **reading: Any
) -> tuple[Source, dict[str, Any]]:
    """The source of a config's images, and the validation arguments of its task."""
    data, settings = config.data, config.train
    reading["labels"] = StyleLabels(data.styles) if data.styles else None
    if data.shards:
        if caption is not None:
            raise ConfigError("data.shards: DreamBooth takes its few images from data.folder")
        stream = ImageStream(
            here / data.shards,
            data.resolution,
            settings.batch_size,
            buckets=data.buckets,
            bucket_step=data.bucket_step,
            bucket_ratio=data.bucket_ratio,
            seed=settings.seed,
            rank=processes.rank,
            world=processes.world,
            on_corrupt=data.on_corrupt,  # type: ignore[arg-type]
            center_crop=data.center_crop,
            flip=data.flip,
        )
        reading["size_conditioning"] = model.size_conditioning
        reading.pop("kept", None)  # a stream has no end
        reading |= {"length": model.length, "warn": lambda line: warnings.warn(line, stacklevel=2)}
        return StreamSource(stream, model.encode, lambda text: model.encode_text([text]), **reading), {}
    folder = _folder(data, here / data.folder, settings.seed, caption)
    trained_on, held_out = config.request().split(len(folder), "data.validation")
    source = _folder_source(config, folder, trained_on, model, settings.batch_size, processes, **reading)
    if not held_out:
        return source, {}
    validation = _folder_source(config, folder, held_out, model, 1, Processes(), **reading)  # one by one: each of them once
    return source, {"validation": validation, "validation_batches": len(held_out)}


def _folder(data: DataTable, path: Path, seed: int, caption: str | None) -> ImageFolder:
    return ImageFolder(
        path,
        data.resolution,
        buckets=data.buckets,
        bucket_step=data.bucket_step,
        bucket_ratio=data.bucket_ratio,
        on_corrupt=data.on_corrupt,  # type: ignore[arg-type]
        caption=caption,
        center_crop=data.center_crop,
        flip=data.flip,
        seed=seed,
        warn=lambda line: warnings.warn(line, stacklevel=2),
    )


def _folder_source(
    config: TrainConfig,
    folder: ImageFolder,
    indices: Sequence[int] | None,
    model: TextToImageModel,
    batch_size: int,
    processes: Processes,
    **reading: Any,
) -> FolderSource:
    def read(caption: str) -> Conditioning:
        return model.encode_text([caption])

    options: dict[str, Any] = {"batch_size": batch_size, "seed": config.train.seed, "processes": processes}
    reading["size_conditioning"] = model.size_conditioning
    source = FolderSource(folder, model.encode, read, indices=indices, **options, **reading)
    source.advice = "; ".join(filter(None, (source.advice, _too_long(model, folder))))
    return source


def _too_long(model: TextToImageModel, folder: ImageFolder) -> str:
    """What is not read of captions, in words."""
    lengths = {caption: model.length(caption) for caption in folder.captions}
    long = {caption: found for caption, found in lengths.items() if found is not None and found[0] > found[1]}
    if not long:
        return ""
    longest = max(long, key=lambda caption: long[caption])
    return too_long(sum(caption in long for caption in folder.captions), len(folder), long[longest], longest)


def _prior(
    config: DreamBoothConfig, here: Path, out: Path | None, model: TextToImageModel, processes: Processes, kept: Kept
) -> Source | None:
    """The class images of DreamBooth: given, or drawn by the base model."""
    table = config.dreambooth
    if table.prior_weight == 0:
        return None
    if table.class_folder:
        folder = _folder(config.data, here / table.class_folder, config.train.seed, table.class_prompt)
        return _folder_source(config, folder, None, model, config.train.batch_size, processes, kept=kept)
    prompts = [table.class_prompt] * table.class_images
    drawn = _generated(config, out, model, prompts, table.class_steps, table.guidance, processes)
    return _latents(config, drawn, model.encode_text([table.class_prompt]), processes)


def _latents(
    config: TrainConfig,
    latents: Tensor,
    conditioning: Conditioning,
    processes: Processes,
    teacher: Conditioning | None = None,
) -> LatentSource:
    batch_size, seed = config.train.batch_size, config.train.seed
    return LatentSource(list(latents), conditioning, teacher, batch_size=batch_size, seed=seed, processes=processes)


def _generated(
    config: TrainConfig,
    out: Path | None,
    model: TextToImageModel,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    processes: Processes,
) -> Tensor:
    """Latents of one image per prompt, drawn once per run and kept in its folder; (N, C, H, W)."""
    resolution, seed = config.data.resolution, config.train.seed
    if out is None:
        shape = model.encode(torch.zeros(1, 3, resolution, resolution)).shape[1:]
        return torch.randn(len(prompts), *shape)
    asked = [model.fingerprint, model.sampling, list(prompts), steps, guidance, resolution, seed]
    path = out / f"generated-{_hash(asked)}.latents"
    if processes.is_main:
        from tqdm import tqdm

        def draw(start: int, stop: int) -> Tensor:
            try:
                return model.sample(prompts[start:stop], resolution, seed + start, steps, guidance)
            except RuntimeError as error:
                if stop - start == 1 or not is_out_of_memory(error):
                    raise
            return torch.cat([draw(k, k + 1) for k in range(start, stop)])

        with tqdm(total=len(prompts), desc=f"{model.name} draws images, {_AT_ONCE} at a time") as bar:
            draw_once(path, len(prompts), draw, at_once=_AT_ONCE, progress=lambda there: bar.update(there - bar.n))
    processes.wait()
    return torch.stack(kept_latents(path))


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=6).hexdigest()


def _check_teacher(model: TextToImageModel, teacher: TextToImageModel, shared_text_encoder: bool) -> None:
    """Refuse a teacher that this student cannot learn from (ConfigError)."""
    try:
        check_teacher(model, teacher)
        if shared_text_encoder:
            check_weights_differ(model, teacher)
    except ValueError as error:
        raise ConfigError(f"teacher.path: {error}") from None
    widths, teacher_widths = ({key: value.shape[-1] for key, value in m.encode_text([""]).items()} for m in (model, teacher))
    if shared_text_encoder and widths != teacher_widths:
        raise ConfigError(
            f"distil.shared_text_encoder: the teacher reads prompts of {teacher_widths}, the student of {widths}; "
            "set it to false, so that each has its own"
        )


def _prompt_pairs(config: DistilConfig, here: Path) -> dict[str, str]:
    """Prompt of the student -> prompt of the teacher, from one or two files line by line."""
    table = config.distil
    if not table.prompts:
        if table.teacher_prompts:
            raise ConfigError("distil.teacher_prompts: they translate distil.prompts, which is empty")
        return {}
    prompts = _lines(here / table.prompts, "distil.prompts")
    translated = _lines(here / table.teacher_prompts, "distil.teacher_prompts") if table.teacher_prompts else prompts
    if len(prompts) != len(translated):
        raise ConfigError(
            f"distil.prompts has {len(prompts)} lines, distil.teacher_prompts {len(translated)}: expected as many"
        )
    return dict(zip(prompts, translated, strict=True))


def _lines(path: Path, field: str) -> list[str]:
    try:
        lines = [one_line(line) for line in decoded(path.read_bytes()).splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: {path.name} cannot be read: {error}") from None
    if not (found := [line for line in lines if line]):
        raise ConfigError(f"{field}: {path.name} has no prompts")
    return found


def _translated(pairs: dict[str, str], caption: str) -> str:
    if pairs and caption not in pairs:
        raise ConfigError(f"caption {caption!r} is not in distil.prompts, so its line in distil.teacher_prompts is not known")
    return pairs.get(caption, caption)
