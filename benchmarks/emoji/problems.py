"""The paper's experiments as they fit the emoji: what is learned from, and what is measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from chinese import chinese_names, train_chinese_encoder
from measure import features, kid, likeness, shares
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from styleinject_core.attach import Attachment
from styleinject_core.call import Listener, ModelCall
from styleinject_core.demo import data
from styleinject_core.demo.classifier import Classifier, load_classifier
from styleinject_core.demo.styles import prompts
from styleinject_core.demo.training import DemoTrainingModel
from styleinject_core.router.control import Rule, Steered, Steering
from styleinject_core.train.data.source import LatentSource
from styleinject_core.train.objectives.tasks import Distil, DreamBooth, FineTune
from styleinject_core.train.settings import TrainSettings

PIXELS = 64
DETAILS = ("confusion", "information", "layers")  # of one drawing of the new concepts alone
QUERY_VALUE, WITH_CONVOLUTIONS = ("to_q", "to_v"), ("to_q", "to_v", "conv")


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Args:
        steps: of training; None takes the problem's.
        sampling_steps: per sample.
        concepts: how many are trained on and measured at most.
        alignment: training steps of the Chinese encoder.
        search: whether the best learning rate is looked for, or the method's own is taken.
    """

    steps: int | None = None
    batch: int = 16
    sampling_steps: int = 12
    concepts: int = 10_000
    alignment: int = 300
    search: bool = True


QUICK = Size(steps=2, batch=2, sampling_steps=2, concepts=3, alignment=2, search=False)


class Problem:
    """Fine-tuning to another style: real drawings of the concepts that are not held out.

    Held-out concepts, and as many of those trained on, are drawn once each and compared with the artist's drawings.

    Args:
        style: what is learned.
        size: how large the runs are.
    """

    targets, rank, steps = QUERY_VALUE, 8, 200
    strengths = (0.6, 0.8, 1.25, 1.5)

    def __init__(self, style: str, size: Size):
        self.style, self.size = style, size
        self.base = DemoTrainingModel.load()
        self.classifier: Classifier = load_classifier()
        numbers = range(len(data.concepts()))
        held_out = [k for k in numbers if data.concepts()[k].held_out]
        self.shown = [k for k in numbers if k not in held_out][: size.concepts]
        self.new = held_out[: size.concepts]
        self.seen = self.shown[:: max(1, len(self.shown) // len(self.new))][: len(self.new)]

    def names(self, concepts: list[int]) -> list[str]:
        """The prompts of concepts, for the model that is trained."""
        return [data.concepts()[k].name for k in concepts]

    def task(self, model: DemoTrainingModel, settings: TrainSettings, given: bool = False) -> FineTune:
        """What is trained for; with `given`, s is the style of each example."""
        return FineTune(
            model,
            self.examples(model, self.shown, settings, given),
            settings,
            model.encode_text([""]),
            validation=self.examples(model, self.new, settings, given),
            validation_batches=self.validation_batches(settings),
        )

    def examples(self, model: DemoTrainingModel, concepts: list[int], settings: TrainSettings, given: bool) -> LatentSource:
        """The drawings of some concepts."""
        latents = model.encode(data.images(self.style)[concepts])
        return self.source(latents, model.encode_text(self.names(concepts)), settings)

    def validation_batches(self, settings: TrainSettings) -> int:
        return max(1, len(self.new) // settings.batch_size)

    def source(self, latents: Tensor, prompts: dict[str, Tensor], settings: TrainSettings, **more: Any) -> LatentSource:
        batch = min(settings.batch_size, len(latents))
        return LatentSource(list(latents), prompts, batch_size=batch, seed=settings.seed, **more)

    @property
    def usual(self) -> int:
        """Steps of the usual training."""
        return self.size.steps or self.steps

    def settings(self, rate: float, seed: int, steps: int = 0) -> TrainSettings:
        """Of a training; one of more steps than usual has a constant rate, and is measured on the way."""
        steps, long = steps or self.usual, steps > self.usual
        return TrainSettings(
            steps,
            self.size.batch,
            learning_rate=rate,
            schedule="constant" if long else "cosine",
            warmup=min(10, steps - 1),
            sample_every=steps // 10 if long else 0,
            seed=seed,
        )

    def draw(self, model: DemoTrainingModel, prompts: list[str], seed: int) -> Tensor:
        """One image per prompt, (N, 3, 64, 64) in [-1, 1]."""
        return model.decode(model.sample(prompts, PIXELS, seed, steps=self.size.sampling_steps))

    def reference(self, concepts: list[int]) -> Tensor:
        """What the samples of these concepts are compared with."""
        return data.images(self.style)[concepts]

    def measure(
        self,
        model: DemoTrainingModel,
        seed: int,
        tuning: bool = False,
        attachment: Attachment | None = None,
        given: bool = False,
    ) -> dict[str, Any]:
        """The columns of one row; of concepts trained on alone, and fewer, to choose a learning rate by.

        Args:
            attachment: of the row's adapter, if it has one.
            given: s is the style's label, as in training.
        """
        groups = {"seen_": self.seen} if tuning else {"": self.new, "seen_": self.seen}
        result: dict[str, Any] = {}
        for prefix, concepts in groups.items():
            columns = self.columns(model, concepts, seed, attachment, given)
            result |= {prefix + name: value for name, value in columns.items() if not prefix or name not in DETAILS}
        if attachment is None or tuning:
            return result
        columns = partial(self.columns, model, self.new, seed, attachment, given)
        return result | self.at_strengths(attachment, columns, ("concept", "style", "both"), result)

    def at_strengths(
        self, attachment: Attachment, columns: Callable[[], dict[str, Any]], names: Sequence[str], at_one: dict[str, Any]
    ) -> dict[str, float]:
        """Some columns at strengths other than 1, and `NAME_area`, the last one's mean over all strengths.

        Args:
            at_one: the columns at strength 1.
        """
        result: dict[str, float] = {}
        for strength in self.strengths:
            attachment.set_strength(strength)
            found = columns()
            result |= {f"{name}@{strength:g}": found[name] for name in names}
        attachment.set_strength(1.0)
        last = names[-1]
        values = [at_one[last], *(result[f"{last}@{strength:g}"] for strength in self.strengths)]
        return {**result, f"{last}_area": sum(values) / len(values)}

    def columns(
        self, model: DemoTrainingModel, concepts: list[int], seed: int, attachment: Attachment | None, given: bool
    ) -> dict[str, Any]:
        """What is measured on one sample of each concept."""
        return self.compare(self.draw(model, self.names(concepts), 1000 + seed), concepts)

    def compare(self, images: Tensor, concepts: list[int]) -> dict[str, float]:
        return self.compared(images, concepts, self.style, self.reference(concepts))

    def compared(self, images: Tensor, concepts: list[int], style: str, wanted: Tensor) -> dict[str, float]:
        """What is recognized in images of one style, and how far they are from those that are wanted."""
        found = shares(self.classifier, images, concepts, style)
        return {**found, "kid": kid(features(self.classifier, images), features(self.classifier, wanted))}

    def ideal(self) -> dict[str, float]:
        """The columns of what is learned from."""
        new, seen = self.compare(self.reference(self.new), self.new), self.compare(self.reference(self.seen), self.seen)
        columns = {**new, **{f"seen_{name}": value for name, value in seen.items()}}
        return {name: value for name, value in columns.items() if not name.endswith("kid")}


class Distillation(Problem):
    """A tuned sibling teaches the base, with the text encoder they share, or a student who reads Chinese: the teacher's own
    drawings are the data, its predictions the goal. The feature loss is for the shared encoder only, as in the paper."""

    targets, rank, steps = WITH_CONVOLUTIONS, 4, 100
    feature_weight = 0.1  # the two terms are then about equally large in the first step

    def __init__(self, style: str, size: Size, chinese: bool = False):
        super().__init__(style, size)
        self.chinese, self.teacher = chinese, DemoTrainingModel.load(style)
        if chinese:
            self.base.text_encoder = train_chinese_encoder(self.base.text_encoder, size.alignment)
        concepts = sorted({*self.shown, *self.new})
        shown = tqdm(torch.arange(len(concepts)).split(32), desc="The teacher draws", leave=False)
        batches = [self.draw_latents([concepts[k] for k in few], 2000 + int(few[0])) for few in shown]
        self.drawn = dict(zip(concepts, torch.cat(batches), strict=True))  # concept -> latents (16, 8, 8)

    def draw_latents(self, concepts: list[int], seed: int) -> Tensor:
        return self.teacher.sample(super().names(concepts), PIXELS, seed, steps=self.size.sampling_steps)

    def names(self, concepts: list[int]) -> list[str]:
        return [chinese_names()[k] for k in concepts] if self.chinese else super().names(concepts)

    def task(self, model: DemoTrainingModel, settings: TrainSettings, given: bool = False) -> Distil:
        return Distil(
            model,
            self.teacher,
            self.examples(model, self.shown, settings, given),
            settings,
            model.encode_text([""]),
            self.teacher.encode_text([""]) if self.chinese else None,
            feature_weight=0.0 if self.chinese else self.feature_weight,
            validation=self.examples(model, self.new, settings, given),
            validation_batches=self.validation_batches(settings),
        )

    def examples(self, model: DemoTrainingModel, concepts: list[int], settings: TrainSettings, given: bool) -> LatentSource:
        latents = torch.stack([self.drawn[k] for k in concepts])
        theirs = self.teacher.encode_text(super().names(concepts)) if self.chinese else None
        return self.source(latents, model.encode_text(self.names(concepts)), settings, teacher=theirs)

    def reference(self, concepts: list[int]) -> Tensor:
        return self.teacher.decode(torch.stack([self.drawn[k] for k in concepts]))


class Styles(Problem):
    """One adapter for all the drawing styles that the base does not know, each named in the prompt by a word of its own.

    The base has never met the words: their embeddings are random, and frozen like everything that is the base's.
    """

    steps = 300

    def __init__(self, size: Size):
        super().__init__(data.BASE_STYLE, size)
        self.styles = list(data.STYLE_WORDS)

    def prompts(self, style: int, concepts: list[int]) -> list[str]:
        return prompts(self.styles[style], self.names(concepts), called=True)

    def validation_batches(self, settings: TrainSettings) -> int:
        return max(1, len(self.styles) * len(self.new) // settings.batch_size)

    def examples(self, model: DemoTrainingModel, concepts: list[int], settings: TrainSettings, given: bool) -> LatentSource:
        """The drawings of some concepts in every style."""
        numbers = range(len(self.styles))
        latents = torch.cat([model.encode(data.images(style)[concepts]) for style in self.styles])
        prompts = model.encode_text([prompt for k in numbers for prompt in self.prompts(k, concepts)])
        return self.source(latents, prompts, settings, styles=[k for k in numbers for _ in concepts] if given else None)

    def measure(
        self,
        model: DemoTrainingModel,
        seed: int,
        tuning: bool = False,
        attachment: Attachment | None = None,
        given: bool = False,
    ) -> dict[str, Any]:
        if tuning:
            fewer = self.columns(model, self.seen[::2], seed, attachment, given)
            return {f"seen_{name}": value for name, value in fewer.items() if name not in DETAILS}
        return super().measure(model, seed, tuning, attachment, given)

    def columns(
        self, model: DemoTrainingModel, concepts: list[int], seed: int, attachment: Attachment | None, given: bool
    ) -> dict[str, Any]:
        """The columns, averaged over the styles; which styles are recognized where each is asked for, `confusion`; and how
        much the choice of the layers' routers says about the style that is asked for, in nats, `information` and `layers`."""
        columns, confusion, heard = [], [], Choices()
        for k, style in enumerate(self.styles):
            with nullcontext() if attachment is None else self.heard(attachment, heard, k, given):
                images = self.draw(model, self.prompts(k, concepts), 1000 + seed)
            columns.append(self.compared(images, concepts, style, data.images(style)[concepts]))
            found = self.classifier(images)[1].argmax(1)
            confusion.append([float((found == other).float().mean()) for other in range(len(data.styles()))])
        result: dict[str, Any] = {name: sum(each[name] for each in columns) / len(columns) for name in columns[0]}
        result["confusion"] = confusion
        if layers := {} if given else heard.information():
            result |= {"information": sum(layers.values()) / len(layers), "layers": layers}
        return result

    def heard(self, attachment: Attachment, choices: Choices, style: int, given: bool) -> AbstractContextManager[None]:
        """While one style is drawn: listen to the routers, or give them the style."""
        choices.style = style
        return self.given_style(attachment, style) if given else attachment.in_call(ModelCall(listeners=(choices,)))

    def given_style(self, attachment: Attachment, style: int) -> AbstractContextManager[None]:
        """s of every layer is one style."""
        adapter = attachment.applied[0].adapter
        steering = Steering([Rule(weights={str(style + 1): 1.0})], adapter)
        steers = steering.steers([True], ("all",), ("all",), sigma=0.0, memory={})
        return attachment.in_call(ModelCall(listeners=(Steered(steers),)))

    def ideal(self) -> dict[str, float]:
        columns = []
        for concepts in (self.new, self.seen):
            found = [shares(self.classifier, data.images(style)[concepts], concepts, style) for style in self.styles]
            columns.append({name: sum(each[name] for each in found) / len(found) for name in found[0]})
        return {**columns[0], **{f"seen_{name}": value for name, value in columns[1].items()}}


class Choices(Listener):
    """How often each layer's router chooses each of its styles where `style` is asked for: positive rows, the first half."""

    def __init__(self) -> None:
        self.style, self.sums = 0, defaultdict[str, dict[int, list[Tensor]]](lambda: defaultdict(list))

    def record(self, layer: str, s: Tensor) -> None:
        self.sums[layer][self.style].append(s[: len(s) // 2].flatten(0, -2).mean(0))

    def information(self) -> dict[str, float]:
        """I(asked style; chosen style) by layer, in nats, where all are asked for as often: at most log of their number."""
        found = {}
        for layer, calls in self.sums.items():
            chosen = torch.stack([torch.stack(calls[style]).mean(0) for style in sorted(calls)]).double()  # (asked, n)
            ratio = torch.special.xlogy(chosen, chosen) - torch.special.xlogy(chosen, chosen.mean(0, keepdim=True))
            found[layer] = float(ratio.sum(1).mean())
        return found


class Subject(Problem):
    """DreamBooth: one artist's drawing of one thing, under an identifier.

    The subject is another artist's tiger; the class is what the base model draws for "tiger face". Measured: the likeness
    of samples to the subject, and whether the class and other things are still drawn as before.
    """

    steps = 100
    subject, identifier = "tiger face", "high"
    samples, class_images = 16, 32

    def __init__(self, style: str, size: Size):
        super().__init__(style, size)
        names = [concept.name for concept in data.concepts()]
        self.concept = names.index(self.subject)
        self.others = [k for k in self.new if k != self.concept]
        count = min(self.samples, size.concepts)
        self.instances, self.classes = [f"{self.identifier} {self.subject}"] * count, [self.subject] * count
        self.pictures = views(data.images(style)[self.concept])
        prior = [self.subject] * min(self.class_images, size.concepts)
        self.class_latents = self.base.sample(prior, PIXELS, 2000, steps=size.sampling_steps)
        self.drift: dict[int, Tensor] = {}  # seed -> features of what the base draws for the others

    def task(self, model: DemoTrainingModel, settings: TrainSettings, given: bool = False) -> DreamBooth:
        instance, prompts = model.encode(self.pictures), model.encode_text(self.instances[:1])
        return DreamBooth(
            model,
            self.source(instance, prompts, settings),
            settings,
            model.encode_text([""]),
            prior=self.source(self.class_latents, model.encode_text(self.classes[:1]), settings),
            validation=self.kept(model, settings),
            validation_batches=self.validation_batches(settings),
        )

    def kept(self, model: DemoTrainingModel, settings: TrainSettings) -> LatentSource:
        """What should stay as it is: other things, none of them trained on, by the base's artist."""
        latents = model.encode(data.images(data.BASE_STYLE)[self.others])
        return self.source(latents, model.encode_text(self.names(self.others)), settings)

    def measure(
        self,
        model: DemoTrainingModel,
        seed: int,
        tuning: bool = False,
        attachment: Attachment | None = None,
        given: bool = False,
    ) -> dict[str, float]:
        columns = partial(self.columns, model, self.others, seed, attachment, given)
        result = columns()
        if attachment is None:
            return result
        names = ("likeness", "subject_style", "others_kept", "subject_and_others")
        return result | self.at_strengths(attachment, columns, names, result)

    def columns(
        self, model: DemoTrainingModel, concepts: list[int], seed: int, attachment: Attachment | None, given: bool
    ) -> dict[str, Any]:
        """The subject's, whatever the concepts; `subject_and_others` is the product of two shares, which either can spoil."""
        instances = self.draw(model, self.instances, 1000 + seed)
        before, after = data.BASE_STYLE, self.style
        subject = features(self.classifier, self.pictures)
        others = self.draw(model, self.names(self.others), 1000 + seed)
        classes = self.draw(model, self.classes, 3000 + seed)
        columns = {
            "likeness": likeness(features(self.classifier, instances), subject),
            "subject_style": self._both(instances, [self.concept] * len(instances), after),
            "class_kept": self._both(classes, [self.concept] * len(classes), before),
            "others_kept": self._both(others, self.others, before),
            "others_kid": kid(features(self.classifier, others), self._before(seed)),
        }
        return {**columns, "subject_and_others": columns["subject_style"] * columns["others_kept"]}

    def ideal(self) -> dict[str, float]:
        subject, count = features(self.classifier, self.pictures), len(self.pictures)
        shown = self._both(self.pictures, [self.concept] * count, self.style)
        return {"likeness": likeness(subject, subject), "subject_style": shown}

    def _both(self, images: Tensor, concepts: list[int], style: str) -> float:
        return shares(self.classifier, images, concepts, style)["both"]

    def _before(self, seed: int) -> Tensor:
        if seed not in self.drift:
            untouched = DemoTrainingModel.load()  # self.base has the row's adapter on it
            self.drift[seed] = features(self.classifier, self.draw(untouched, self.names(self.others), 4000 + seed))
        return self.drift[seed]


def views(image: Tensor) -> Tensor:
    """Five views of one drawing (3, 64, 64): as it is, smaller by a little, smaller and up left, down right, mirrored."""
    views = [image]
    for side, left, top in ((56, 4, 4), (52, 2, 2), (52, 10, 10)):
        small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
        views.append(F.pad(small, (left, PIXELS - side - left, top, PIXELS - side - top), value=1.0))  # white
    return torch.stack([*views, image.flip(2)])
