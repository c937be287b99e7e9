"""One sampling run of a MODEL with adapters: what lasts exactly as long as the run, and which rows are whose."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .guidance import Passes
from .injection import Injection
from .monitor import Monitor
from .reference import AppliedReference
from .taking_part import TakingPart

UNKNOWN = "unknown"  # the role of rows that are not the conditionings ComfyUI was asked for


class Run:
    """One sampling run of one MODEL.

    Args:
        guider: ComfyUI's, which knows its conditionings by name.
        sigmas: the schedule, one more than there are steps; on the CPU.
        injections: the adapters on the MODEL.
        monitors: who wants to know.
        references: the reference images on the MODEL.
    """

    def __init__(
        self,
        guider: Any,
        sigmas: Tensor,
        injections: Sequence[Injection],
        monitors: Sequence[Monitor],
        references: Sequence[AppliedReference] = (),
    ) -> None:
        self.guider, self.sigmas, self.steps = guider, sigmas, max(1, len(sigmas) - 1)
        model, gpu = guider.model_patcher.model, guider.model_patcher.load_device.type != "cpu"
        self.injections, self.references = tuple(injections), tuple(references)
        self.observations = [o for monitor in monitors for o in monitor.observe(injections, model, self.steps, gpu)]
        self.passes, self.taking_part = Passes(), TakingPart(injections, references)
        self.memory: dict[Any, Tensor] = {}  # what router controls hold for the length of the run
        self._warned = False
        self._seen: dict[int, int] = {}  # observation -> calls that the live feed has shown

    def roles(self, conds: Sequence[Any]) -> tuple[str, ...]:
        """The name of each conditioning: the guider's for that very list, or for one made of its entries; else its place."""
        known: dict[str, Any] = getattr(self.guider, "conds", None) or {}
        by_entry, found = self.by_entry(), []
        for place, entries in enumerate(conds):
            name = next((name for name, own in known.items() if entries is not None and entries is own), None)
            of_entries = [by_entry.get(entry.get("uuid"), set()) for entry in entries or ()]
            names = {name} if name is not None else set.intersection(*of_entries) if of_entries else set()
            found.append(names.pop() if len(names) == 1 else f"cond {place}")
        return tuple(found)

    def by_entry(self) -> dict[Any, set[str]]:
        """Id of a conditioning's entry -> its names: an area's entry is in the other prompt's list too, under the same id."""
        names: dict[Any, set[str]] = {}
        for name, entries in (getattr(self.guider, "conds", None) or {}).items():
            for entry in entries or ():
                names.setdefault(entry.get("uuid"), set()).add(name)
        return names

    def warn_of_unknown_rows(self, injection: Injection) -> None:
        """Say once that a control for one prompt has no effect on rows that nobody can tell apart."""
        if not self._warned and any(rule.role != "all" for rule in injection.control):
            self._warned = True
            logging.warning(
                "StyleInject: another node has rearranged the batch; router controls of %s for the positive or the negative "
                "prompt alone have no effect",
                injection.applied.adapter.name,
            )

    def stepped(self, step: int) -> None:
        """Show what has happened since the last step in the browser."""
        for place, observation in enumerate(self.observations):
            recorder = observation.recorder
            latest = recorder.since(self._seen.get(place, 0))
            self._seen[place] = recorder.recorded
            if latest is not None:
                observation.feed.step(step, self.steps, recorder.sigma, *latest, levels=self.sigmas[:-1])

    def close(self, result: Tensor | None, label: str) -> None:
        """Hand what was recorded to the monitors; `result` is None where the run did not come to its end."""
        self.guider, self.memory = None, {}
        for observation in self.observations:
            observation.feed.close(result is not None)
        for monitor in {id(o.monitor): o.monitor for o in self.observations}.values():
            own = [o for o in self.observations if o.monitor is monitor]
            monitor.keep([o.trace(self.sigmas[:-1], result is not None, label) for o in own], result)

    def __deepcopy__(self, memo: dict) -> Run:
        return self


@dataclass(frozen=True)
class Conditionings:
    """What a sampling run is working out now: the conditionings, as ComfyUI was asked for them, and the images of each."""

    run: Run
    conds: Sequence[Any] = ()
    images: int = 0
    guidance: bool = False

    def of_rows(self, rows: int, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The role of each equal part of a batch of `rows`; one part, unknown, where it is not what was asked for.

        Nodes that split a batch, as for context windows, stand inside or outside of our wrapper: how many images were asked
        for last is in `sigmas`, and whose they are in `uuids`, which ComfyUI writes behind all of them.

        Args:
            options: the model call's transformer_options.
        """
        entries, ids, sigmas = (options.get(key) for key in ("cond_or_uncond", "uuids", "sigmas"))
        images = {self.images, len(sigmas) if isinstance(sigmas, Tensor) and sigmas.ndim == 1 else 0}
        if not entries or rows not in {count * len(entries) for count in images}:
            return (UNKNOWN,)
        by_entry = self.run.by_entry() if ids is not None and len(ids) == len(entries) else {}
        roles, found = self.run.roles(self.conds), list[str]()
        for place, entry in enumerate(entries):
            names = by_entry.get(ids[place], set()) if by_entry and ids is not None else set()
            if len(names) != 1:
                names = set(roles[entry : entry + 1])
            found.extend(names)
        return tuple(found) if len(found) == len(entries) else (UNKNOWN,)

    def recorded(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """What rows of these roles are called in a recording: those of a guidance are not the prompt's own."""
        return tuple(f"{role} guidance" for role in roles) if self.guidance else roles

    def __deepcopy__(self, memo: dict) -> Conditionings:
        return self
