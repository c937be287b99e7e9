"""What a trained adapter's file says about how it was made."""

from __future__ import annotations

import json
from typing import Any

from ...methods import chosen
from ..objectives.tasks import Distil, FineTune
from ..settings import TrainSettings

# What ModelSpec calls them, where it has other words; its ids tell the two kinds of Stable Diffusion 2 apart.
_MODELSPEC_PREDICTIONS = {"v_prediction": "v"}
_MODELSPEC_OF_V = {"stable-diffusion-v2-512": "stable-diffusion-v2-768-v"}


def made_by(
    task: FineTune, settings: TrainSettings, *, architecture: str, method: str, base: str, teacher: str = ""
) -> dict[str, str]:
    """ModelSpec 1.0 fields and our own, as an adapter file's header keeps them: no paths, nothing of the machine.

    Args:
        architecture: of the frozen model, as ModelSpec names it.
        method: one of `methods.choices()`.
        base, teacher: what to call the frozen models.
    """
    plan, prediction = task.plan(), task.model.schedule.prediction_type
    if prediction == "v_prediction":
        architecture = _MODELSPEC_OF_V.get(architecture, architecture)
    entries: dict[str, Any] = {
        "modelspec.architecture": f"{architecture}/{method}",
        "modelspec.implementation": chosen(method).paper,
        "modelspec.prediction_type": _MODELSPEC_PREDICTIONS.get(prediction, prediction),
        "styleinject.objective": task.objective,
        "styleinject.base": base,
        "styleinject.base_hash": task.model.fingerprint,
        "styleinject.data": json.dumps({key: plan[key] for key in ("data", "prior", "validation") if key in plan}),
        "styleinject.settings": json.dumps(settings.result_fields()),
    }
    if isinstance(task, Distil):
        entries |= {"styleinject.teacher": teacher, "styleinject.teacher_hash": task.teacher.fingerprint}
    return entries
