"""What tells frozen models apart: all of their weights."""

from __future__ import annotations

import json

import pytest
import torch

from styleinject_core.train.data.batches import weights_hash
from styleinject_core.train.run.checkpoints import CheckpointError, RunFolder, TrainState

PLACES = [0, 63, 64, 1000, 4095, 8190]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("place", PLACES)
def test_a_change_anywhere_is_noticed(dtype: torch.dtype, place: int) -> None:
    weights = torch.linspace(-3, 3, 8191).to(dtype)
    changed = weights.clone()
    changed.view(torch.uint8)[place * weights.element_size()] ^= 1
    assert weights_hash([weights]) == weights_hash([weights.clone()]) != weights_hash([changed])


def test_places_shapes_and_dtypes_count() -> None:
    weights = torch.arange(24.0).reshape(4, 6)
    others = [weights.T, weights.T.contiguous(), weights.flip(0), weights.reshape(6, 4), weights.double(), weights[:3]]
    assert len({weights_hash([each]) for each in (weights, *others)}) == 6, "a transposed view is its values"
    assert weights_hash([weights, weights + 1]) != weights_hash([weights + 1, weights])


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_states_that_knew_models_by_other_hashes(tmp_path, version: int, monkeypatch) -> None:
    """Older ones are gone on from, where nothing else differs."""
    run, now = RunFolder(tmp_path / "run"), {"model": "new", "sampling": {"encoders": "new", "prediction_type": "epsilon"}}
    monkeypatch.setattr("styleinject_core.train.run.checkpoints.STATE_VERSION", version)
    run.save_state(TrainState(2, {"model": "old", "sampling": {"encoders": "old", "prediction_type": "epsilon"}}))
    monkeypatch.undo()
    if version == 4:
        with pytest.raises(CheckpointError, match="model: was old, is new"):
            run.load_state(now, 4)
    else:
        state = run.load_state(now, 4)
        assert state is not None and state.step == 2
    with pytest.raises(CheckpointError, match="prediction_type"):
        run.load_state(json.loads(json.dumps(now).replace("epsilon", "v_prediction")), 4)
