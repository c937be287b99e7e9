"""The config files of `styleinject train`, `dreambooth` and `distill`: every field, its default, and what it means.

The tables below are the reference: `styleinject train --template` writes them out as a commented TOML file.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..train.data.labels import StyleLabels
from ..train.models.noise import PREDICTION_TYPES
from ..train.request import DTYPES, AdapterRequest, Drawing, TrainingRequest, check_name
from ..train.settings import TrainSettings, about, check_choice

Table = TypeVar("Table")


class ConfigError(ValueError):
    """A config file that cannot be used; the message names the file and the field."""


@dataclass(frozen=True)
class ModelTable:
    """The model the adapter is for."""

    path: str = field(
        metadata=about(
            'a diffusers folder, a .safetensors checkpoint, or "demo", the embedded model ("demo:noto" draws another style).\n'
            "On Windows write paths with /, or in single quotes."
        )
    )
    config: str = field(
        default="",
        metadata=about(
            "for a checkpoint file: a diffusers folder of the same kind of model, for its tokenizer and settings; it needs no\n"
            "weights."
        ),
    )
    dtype: str = field(
        default="float32",
        metadata=about("what the frozen model computes in: float32, bfloat16 or float16; the adapter is float32 always."),
    )

    prediction_type: str = field(
        default="",
        metadata=about(
            'what the model predicts, where its files are wrong about it: "epsilon", "v_prediction" or "sample"; empty for\n'
            "what they say, which the run's first line tells."
        ),
    )
    zero_terminal_snr: bool = field(
        default=False,
        metadata=about("its schedule ends in pure noise, and its files do not say so (some v-prediction models)."),
    )

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        if self.prediction_type:
            check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES[:3])

    def sampling(self) -> dict[str, Any]:
        """What the fields above state, as a diffusers scheduler's config has it."""
        stated = {"prediction_type": self.prediction_type, "rescale_betas_zero_snr": self.zero_terminal_snr}
        return {key: value for key, value in stated.items() if value}


@dataclass(frozen=True)
class DataTable:
    """What it learns from. Give a folder or shards."""

    folder: str = field(
        default="", metadata=about('images with NAME.txt beside them, or a metadata.jsonl (or .csv) of "file_name" and "text".')
    )
    shards: str = field(default="", metadata=about('WebDataset shards, as in "data/{000..009}.tar"; read as a stream.'))
    resolution: int = field(
        default=512, metadata=about("pixels of a square image's side: 512 for Stable Diffusion 1.x, 1024 for XL.")
    )
    buckets: bool = field(
        default=True, metadata=about("keep aspect ratios, in buckets of about the same area; false crops to squares.")
    )
    bucket_step: int = field(default=64, metadata=about("sides of buckets are multiples of this."))
    bucket_ratio: float = field(
        default=2.0, metadata=about("longest side to shortest of a bucket, at most; the rest of a panorama is cut off.")
    )
    center_crop: bool = field(default=True, metadata=about("false crops anywhere."))
    flip: bool = field(default=False, metadata=about("mirror half of the images."))
    styles: tuple[str, ...] = field(
        default=(),
        metadata=about(
            "names of styles that folders or captions have: an image of such a folder, or with such a word, trains that\n"
            "style of the adapter, and Style Mixer has it by its name. Not for DreamBooth."
        ),
    )
    style_dropout: float = field(
        default=0.1, metadata=about("share of these images whose style the router chooses all the same, so that it learns to.")
    )
    on_corrupt: str = field(
        default="skip", metadata=about('what to do about an image that cannot be read: "skip" it, or "stop".')
    )
    validation: int = field(default=0, metadata=about("how many images of the folder are held out, for the validation loss."))

    def __post_init__(self) -> None:
        check_choice("on_corrupt", self.on_corrupt, ("skip", "stop"))
        _at_least(self, 1, "resolution", "bucket_step", "bucket_ratio")
        _at_least(self, 0, "validation")
        StyleLabels(self.styles)
        if not 0 <= self.style_dropout < 1:
            raise ValueError(f"style_dropout: expected 0 to below 1, found {self.style_dropout}")
        if self.folder and self.shards:
            raise ValueError("folder and shards: give one of them")
        if self.validation and not self.folder:
            raise ValueError("validation: images can be held out of a folder only")


@dataclass(frozen=True)
class OutputTable:
    """What comes out, and where."""

    folder: str = field(
        metadata=about(
            "the run's folder: checkpoints, the final adapter, loss.jsonl, loss.png, pictures. Run the same command again\n"
            "to go on where it stopped."
        )
    )
    name: str = field(default="adapter", metadata=about("the adapter's file name, without .safetensors."))
    dtype: str = field(
        default=TrainingRequest.dtype, metadata=about("what the adapter's file is stored in: float32, bfloat16 or float16.")
    )
    prompts: tuple[str, ...] = field(default=(), metadata=about("what to draw every train.sample_every steps."))
    guidance: float = field(default=Drawing.guidance, metadata=about("classifier-free guidance of these pictures."))
    tensorboard: bool = field(
        default=False, metadata=about("also write the losses for TensorBoard (needs the package tensorboard).")
    )
    title: str = field(default="", metadata=about("for the file's metadata, as are the next four."))
    author: str = field(default="", metadata=about("who made it."))
    description: str = field(default="", metadata=about("in a sentence or two."))
    license: str = field(default="", metadata=about("an SPDX name."))
    trigger_phrase: str = field(default="", metadata=about("words that call the style or subject."))

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        if not self.folder.strip():
            raise ValueError("folder: it is empty, name a folder for the run")
        object.__setattr__(self, "name", check_name(self.name))


@dataclass(frozen=True)
class DreamBoothTable:
    """A few images of one subject, and how the base model draws its kind."""

    instance_prompt: str = field(
        metadata=about('the subject with its identifier, as in "a sks dog"; the caption of every image in data.folder.')
    )
    class_prompt: str = field(metadata=about('its kind, as in "a dog".'))
    class_folder: str = field(
        default="", metadata=about("images of the kind; left empty, the base model draws them before training.")
    )
    class_images: int = field(default=100, metadata=about("how many it draws."))
    class_steps: int = field(default=Drawing.steps, metadata=about("sampling steps for each."))
    guidance: float = field(default=Drawing.guidance, metadata=about("classifier-free guidance for them."))
    prior_weight: float = field(default=1.0, metadata=about("weight of the class images' loss; 0 does without them."))

    def __post_init__(self) -> None:
        if self.class_images < 1:
            raise ValueError(
                f"class_images: expected at least 1, found {self.class_images}; prior_weight = 0 does without them"
            )
        _at_least(self, 1, "class_steps")
        _at_least(self, 0, "prior_weight")


@dataclass(frozen=True)
class DistilTable:
    """How the student compares itself to the teacher."""

    shared_text_encoder: bool = field(
        default=True,
        metadata=about(
            "the teacher reads the student's prompts as the student's text encoder encodes them; false\n"
            "lets each use its own, and compares outputs only."
        ),
    )
    output_weight: float = field(default=1.0, metadata=about("of the difference of predictions."))
    feature_weight: float | None = field(
        default=None,
        metadata=about("of the differences of the U-Nets' blocks; by default 1, or 0 where text encoders are not shared."),
    )
    prompts: str = field(
        default="",
        metadata=about("a text file, a prompt per line, for a run without images: the teacher draws them before training."),
    )
    teacher_prompts: str = field(default="", metadata=about("the same lines for the teacher, where it reads another language."))
    images_per_prompt: int = field(default=1, metadata=about("how many images of each prompt it draws."))
    sampling_steps: int = field(default=Drawing.steps, metadata=about("for each of them."))
    guidance: float = field(default=Drawing.guidance, metadata=about("classifier-free guidance for them."))

    def __post_init__(self) -> None:
        _at_least(self, 1, "images_per_prompt", "sampling_steps")
        _at_least(self, 0, "output_weight", "features")
        if not self.output_weight and not self.features:
            raise ValueError("output_weight and feature_weight are both 0: there is nothing to learn")
        if not self.shared_text_encoder and self.feature_weight:
            raise ValueError("feature_weight: with text encoders that are not shared only outputs are compared, set it to 0")
        if self.teacher_prompts and self.shared_text_encoder:
            raise ValueError("teacher_prompts: they need shared_text_encoder = false")

    @property
    def features(self) -> float:
        """λ_feat."""
        return float(self.shared_text_encoder) if self.feature_weight is None else self.feature_weight


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`styleinject train`: fine-tune on images and captions."""

    model: ModelTable
    output: OutputTable
    data: DataTable = field(default_factory=DataTable)
    adapter: AdapterRequest = field(default_factory=AdapterRequest)
    train: TrainSettings = field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        if not (self.data.folder or self.data.shards or self.needs_no_images):
            raise ValueError("data.folder or data.shards: one of them is needed")
        if self.train.validate_every and not self.data.validation:
            raise ValueError("train.validate_every: set data.validation to how many images are held out for it")
        if self.train.sample_every and not self.output.prompts:
            raise ValueError("train.sample_every: set output.prompts to what is to be drawn")
        if self.data.styles:
            object.__setattr__(self, "adapter", self.adapter.labeled(self.data.styles, "data.styles"))
            if not (self.data.folder or self.data.shards):
                raise ValueError("data.styles: are named by images, give data.folder or data.shards")

    @property
    def needs_no_images(self) -> bool:
        return False

    def request(self) -> TrainingRequest:
        """The same, as the core and the nodes know it."""
        return TrainingRequest(
            name=self.output.name,
            adapter=self.adapter,
            settings=self.train,
            held_out=self.data.validation,
            dtype=self.output.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class DreamBoothConfig(TrainConfig):
    """`styleinject dreambooth`: one subject from a few images."""

    dreambooth: DreamBoothTable

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.styles:
            raise ValueError("data.styles: DreamBooth learns one subject, not styles")


@dataclass(frozen=True, kw_only=True)
class DistilConfig(TrainConfig):
    """`styleinject distill`: one checkpoint into another."""

    teacher: ModelTable
    distil: DistilTable = field(default_factory=DistilTable)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.min_snr_gamma:
            raise ValueError(
                "train.min_snr_gamma: it weights the error of fine-tuning, which distillation does not have: leave it at 0"
            )

    @property
    def needs_no_images(self) -> bool:
        return bool(self.distil.prompts)


def load_config(kind: type[Table], path: Path) -> Table:
    """Read a config file.

    Raises:
        ConfigError: no such file, not TOML, an unknown or missing field, a value of another type or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        hint = "it is UTF-16, as some shells write it: " if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError(f"{path.name}: not UTF-8 text; {hint}save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    try:
        values = _parse(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else _shortened(str(error))
        raise ConfigError(f"{path.name}: {reason}" + (_BACKSLASH if "\\" in text else "")) from None
    try:
        return _table(kind, values, "")
    except (ValueError, OverflowError, RecursionError) as error:  # numbers of hundreds of digits are valid TOML
        raise ConfigError(f"{path.name}: {_shortened(str(error))}") from None


def _shortened(text: str, longest: int = 1000) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 4 :]}"


def _parse(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    return tomllib.loads(text)


def _table(kind: type[Table], values: dict[str, Any], where: str) -> Table:
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f", did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
            raise ValueError(f"{where}{name}: unknown field{hint}")
    arguments = {}
    for f in fields(kind):  # type: ignore[arg-type]
        if f.name in values:
            arguments[f.name] = _value(hints[f.name], values[f.name], f"{where}{f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            what = "table" if is_dataclass(hints[f.name]) else "field"
            raise ValueError(f"{where}{f.name}: this {what} is needed")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table, found {value!r}")
        return _table(kind, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is tuple:
        item_kind, words = get_args(kind)[0], {str: "strings", int: "whole numbers"}
        if not isinstance(value, list) or not all(type(item) is item_kind for item in value):
            raise ValueError(f"{where}: expected a list of {words[item_kind]}, found {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if where.rpartition(".")[2] in _PATHS and isinstance(value, str) and re.search(r"[\x00-\x1f]", value):
        raise ValueError(f"{where}: {value!r} has a tab, a line break or the like in it{_BACKSLASH}")
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {_NAMES[kind]}, found {value!r}")
    return value


_PATHS = {"path", "config", "folder", "shards", "class_folder", "prompts", "teacher_prompts"}
_BACKSLASH = "; write a path with / or in single quotes: 'C:\\models\\sd15'"
_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def template(kind: type) -> str:
    """A TOML file with every field of a config, its default and its meaning; fields without a default are to be filled in."""
    parts = [f"# {inspect.getdoc(kind)}\n"]
    hints = get_type_hints(kind)
    for section in fields(kind):
        table = hints[section.name]
        lines = [f"\n# {(inspect.getdoc(table) or '').splitlines()[0]}", f"[{section.name}]"]
        for f in fields(table):
            lines += [f"# {line}" for line in f.metadata["about"].splitlines()]
            if f.default is MISSING:
                lines.append(f'{f.name} = "..."')
            elif f.default is None:
                lines.append(f"# {f.name} = 1.0")
            else:
                lines.append(f"{f.name} = {_toml(f.default)}")
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _at_least(table: Any, least: int, *names: str) -> None:
    for name in names:
        if not getattr(table, name) >= least:
            raise ValueError(f"{name}: expected at least {least}, found {getattr(table, name)}")
