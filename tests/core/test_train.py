"""The training loop: that it finds what is there to find, and that it can be stopped anywhere without losing a bit."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from styleinject_core import Adapter, AdapterConfig, attach, load_adapter
from styleinject_core.call import Listener, ModelCall
from styleinject_core.files import AdapterFileError
from styleinject_core.files.checked import checksum
from styleinject_core.router.mean import ROUTER_MEAN, router_mean
from styleinject_core.train.parallel import Processes
from styleinject_core.train.run.checkpoints import CheckpointError, RunFolder
from styleinject_core.train.run.loop import Observer, TrainingError, run_plan, train
from styleinject_core.train.run.optimizers import evaluating, make_optimizer
from styleinject_core.train.settings import OPTIMIZERS, TrainSettings


class Restyle:
    """A frozen layer, and outputs in another style: channels rescaled, and a low-rank change of what they show."""

    is_float16 = False
    advice = content = ""

    def __init__(self, width=8):
        torch.manual_seed(0)
        self.host = nn.ModuleDict({"to_q": nn.Linear(width, 6)}).requires_grad_(False)
        self.x = torch.randn(16, 12, width)
        h = self.host["to_q"](self.x)
        mean = h.mean(1, keepdim=True)
        restyled = (h - mean) * torch.tensor([0.5, 2, 1, 1.5, 0.2, 1]) + mean
        self.target = restyled + self.x @ (torch.randn(width, 1) @ torch.randn(1, 6)) * 0.5
        self.seen = 0  # as a stream's position
        self.fail_at = {}  # forward pass -> what happens

    def adapter(self):
        torch.manual_seed(1)
        return Adapter.create(self.host, AdapterConfig(r=2, n_styles=2, target_modules=("to_q",)))

    @contextmanager
    def installed(self, adapter):
        with attach(self.host, adapter) as attachment:
            yield attachment

    def loss(self, rng):
        self.seen += 1
        happening = self.fail_at.pop(rng.index, None)
        if isinstance(happening, BaseException):
            raise happening
        noise = rng.normal(self.x)
        loss = (self.host["to_q"](self.x + 0.01 * noise) - self.target).square().mean()
        return loss * (happening if happening is not None else 1.0)

    def validation_loss(self):
        return float((self.host["to_q"](self.x) - self.target).square().mean())

    def plan(self):
        return {"objective": "restyle", "data": {"images": 16, **({"content": self.content} if self.content else {})}}

    def state_dict(self):
        return {"seen": self.seen, "where": torch.tensor([self.seen])}

    def load_state_dict(self, state):
        assert state["where"].item() == state["seen"]
        self.seen = state["seen"]


SETTINGS = TrainSettings(30, learning_rate=2e-2, warmup=5, schedule="cosine", accumulation=2, checkpoint_every=7)


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.fixture
def task():
    return Restyle()


def test_training_finds_the_style_and_leaves_the_host(task):
    adapter, before, steps = task.adapter(), task.host["to_q"].weight.clone(), []
    watch = Observer()
    watch.progress = lambda p: steps.append((p.step, p.steps))
    result = train(adapter, task, TrainSettings(300, learning_rate=2e-2, weight_decay=0, schedule="linear"), observer=watch)
    assert result.losses[-1] < 0.02 * result.losses[0]
    assert steps == [(k, 300) for k in range(1, 301)]
    assert torch.equal(task.host["to_q"].weight, before)
    assert "forward" not in task.host["to_q"].__dict__


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(task):
    adapters = [task.adapter() for _ in range(3)]
    for adapter, seed in zip(adapters, (5, 5, 6), strict=True):
        train(adapter, task, TrainSettings(5, seed=seed))
    assert same(adapters[0], adapters[1])
    assert not same(adapters[0], adapters[2])


def test_accumulation_averages_over_a_batch(task):
    """Two passes of half a batch are one pass of the whole."""
    whole, halves = task.adapter(), task.adapter()
    x, target = task.x, task.target
    train(whole, task, TrainSettings(1, learning_rate=1e-2))

    class Halves(Restyle):
        def loss(self, rng):
            part = slice(8 * rng.index, 8 * rng.index + 8)
            noise = type(rng)(0, 0).normal(x)
            return (self.host["to_q"](x + 0.01 * noise)[part] - target[part]).square().mean()

    train(halves, Halves(), TrainSettings(1, learning_rate=1e-2, accumulation=2))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, halves.state_dict()[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", ["interrupt", "exception", "killed"])
def test_resume_is_exact(tmp_path, optimizer, stop):
    width = 1024 if optimizer == "adamw8bit" else 8  # at least 4,096 values have their state in 8 bits
    task = Restyle(width)
    settings = TrainSettings(**{**vars(SETTINGS), "optimizer": optimizer, "validate_every": 6})
    if optimizer == "prodigy":
        settings = TrainSettings(**{**vars(settings), "learning_rate": 1.0})
    try:
        make_optimizer([nn.Parameter(torch.zeros(1))], settings)
    except ImportError as error:
        pytest.skip(str(error))
    whole = task.adapter()
    expected = train(whole, task, settings, run=RunFolder(tmp_path / "whole"))

    folder, other = RunFolder(tmp_path / "parts"), Restyle(width)
    watch = Observer()
    if stop == "exception":
        other.fail_at = {2 * 17 + 1: MemoryError("out of memory")}  # in the middle of a step
        with pytest.raises(MemoryError):
            train(other.adapter(), other, settings, run=folder)
    else:
        saved = folder.save_state

        def stop_at(progress):
            if progress.step == 17:
                if stop == "killed":  # nobody gets to write anything
                    folder.save_state = folder.save_adapter = lambda *_: None
                raise KeyboardInterrupt

        watch.progress = stop_at
        with pytest.raises(KeyboardInterrupt):
            train(other.adapter(), other, settings, run=folder, observer=watch)
        assert saved
    assert "forward" not in other.host["to_q"].__dict__

    resumed, fresh = task.adapter(), Restyle(width)
    with torch.no_grad():
        resumed.layers["to_q"].A.add_(1)  # whatever it is, the checkpoint's takes its place
    result = train(resumed, fresh, settings, run=RunFolder(tmp_path / "parts"))
    assert result.resumed_from == (14 if stop == "killed" else 17)
    assert result.losses == expected.losses
    assert result.validation == expected.validation
    assert result.best_step == expected.best_step
    assert fresh.seen == 2 * 30
    assert same(resumed, whole)
    for name in ("step-000007", "step-000030", "best"):
        both = [load_adapter(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts")]
        assert same(*both)
    lines = [json.loads(line) for line in folder.loss_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))


def test_the_mean_of_the_router_is_kept_with_the_adapter(task, tmp_path):
    """Of its own steps, the same over a resume; of the best step where there is a best one."""
    adapter, heard = task.adapter(), []

    class Heard(Listener):
        def record(self, layer, s):
            heard.append(s.detach().mean(0))

    class Listened(Restyle):
        @contextmanager
        def installed(self, adapter):
            with attach(self.host, adapter) as attachment, attachment.in_call(ModelCall(listeners=(Heard(),))):
                yield attachment

    settings = replace(SETTINGS, steps=14, schedule="constant")
    train(adapter, Listened(), settings, run=RunFolder(tmp_path / "whole"))
    mean = torch.zeros(2)
    for step, s in enumerate(heard[::2]):  # two passes a step: the first counts
        mean = torch.lerp(mean, s, max(0.01, 1 / (step + 1)))
    torch.testing.assert_close(router_mean(adapter)["to_q"], mean, atol=1e-5, rtol=0)
    saved = load_adapter(tmp_path / "whole" / "step-000014.safetensors")
    assert saved.metadata[ROUTER_MEAN] == adapter.metadata[ROUTER_MEAN]

    first, second = task.adapter(), task.adapter()
    train(first, Restyle(), replace(settings, steps=7), run=RunFolder(tmp_path / "parts"))
    assert router_mean(first)["to_q"].tolist() != router_mean(adapter)["to_q"].tolist()
    train(second, Restyle(), settings, run=RunFolder(tmp_path / "parts"))
    assert second.metadata[ROUTER_MEAN] == adapter.metadata[ROUTER_MEAN]

    best, last = task.adapter(), task.adapter()
    losses = iter([1.0, 2.0])
    task.validation_loss = lambda: next(losses)
    train(best, task, replace(settings, validate_every=7), run=RunFolder(tmp_path / "best"))
    train(last, Restyle(), replace(settings, steps=7))
    assert same(best, last) and best.metadata[ROUTER_MEAN] == first.metadata[ROUTER_MEAN] == last.metadata[ROUTER_MEAN]


def test_going_on_after_the_end(task, tmp_path):
    """A constant rate may go on for more steps, bit for bit as if it had been so long from the start."""
    long, short = TrainSettings(12, learning_rate=1e-2), TrainSettings(5, learning_rate=1e-2)
    whole, parts = task.adapter(), task.adapter()
    train(whole, task, long)
    train(parts, task, short, run=RunFolder(tmp_path / "run"))
    done = train(task.adapter(), task, short, run=RunFolder(tmp_path / "run"))
    assert (done.step, done.resumed_from, len(done.losses)) == (5, 5, 5)
    train(parts, task, long, run=RunFolder(tmp_path / "run"))
    assert same(whole, parts)


def test_what_resume_refuses(task, tmp_path):
    run = RunFolder(tmp_path / "run")
    train(task.adapter(), task, SETTINGS, run=run)
    changed = TrainSettings(**{**vars(SETTINGS), "learning_rate": 1e-3, "seed": 4})
    with pytest.raises(
        CheckpointError, match=r"step 30 of another run(.|\n)*learning_rate: was 0.02, is 0.001(.|\n)*seed: was 0"
    ):
        train(task.adapter(), task, changed, run=run)
    other = Adapter.create(task.host, AdapterConfig(r=1, n_styles=2, target_modules=("to_q",)))
    with pytest.raises(CheckpointError, match=r"adapter\.r: was 2, is 1"):
        train(other, task, SETTINGS, run=run)
    constant, fewer = (TrainSettings(steps, learning_rate=1e-2) for steps in (5, 4))
    train(task.adapter(), task, constant, run=RunFolder(tmp_path / "long"))
    with pytest.raises(CheckpointError, match="long/resume.state is at step 5 already, and 4 steps are asked for"):
        train(task.adapter(), task, fewer, run=RunFolder(tmp_path / "long"))
    for state in (run.state_file, run.previous_state_file):
        state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"run/resume.state: damaged.*run/resume.previous.state: damaged.*delete what"):
        train(task.adapter(), task, SETTINGS, run=run)


@pytest.mark.parametrize(("factor", "what"), [(float("nan"), "loss became nan"), (float("inf"), "loss became inf"),
                                              (1e30, "gradient became inf")])  # fmt: skip
def test_nan_stops_at_the_last_good_step(task, tmp_path, factor, what):
    states = []
    watch = Observer()
    adapter = task.adapter()
    watch.progress = lambda p: states.append({k: v.clone() for k, v in adapter.state_dict().items()})
    task.fail_at = {9: factor}
    with pytest.raises(TrainingError, match=rf"{what} at step 10 of 30(.|\n)*last checkpoint is step 7, in run"):
        train(adapter, task, TrainSettings(30, checkpoint_every=7), run=RunFolder(tmp_path / "run"), observer=watch)
    assert all(torch.equal(v, states[-1][k]) for k, v in adapter.state_dict().items())
    assert len(states) == 9
    assert load_adapter(tmp_path / "run" / "step-000007.safetensors")
    assert not list((tmp_path / "run").glob("step-000009*"))


def watched(problems):
    watch = Observer()
    watch.problem = problems.append
    return watch


def refusing(run, monkeypatch, steps):
    """The disk refuses the states of some steps."""
    write = run.save_state

    def save_state(state):
        if state.step in steps and run.path.name == "run":
            raise AdapterFileError("No space left on device")
        write(state)

    monkeypatch.setattr(run, "save_state", save_state)


def test_a_full_disk_is_reported_and_survived(task, tmp_path, monkeypatch):
    run, problems = RunFolder(tmp_path / "run"), []
    refusing(run, monkeypatch, {5})
    adapter = task.adapter()
    train(adapter, task, TrainSettings(10, checkpoint_every=5), run=run, observer=watched(problems))
    assert problems == ["checkpoint of step 5: No space left on device"]
    expected = task.adapter()
    train(expected, task, TrainSettings(10))
    assert same(adapter, expected)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The system's folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def full(run, monkeypatch, begins=0):
    """The disk of the run's folder takes nothing more after some step; other disks do."""
    write = RunFolder.save_state

    def save_state(self, state):
        if self.path == run.path and state.step > begins:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, state)

    monkeypatch.setattr(RunFolder, "save_state", save_state)


def test_checkpoints_that_are_refused_end_the_run_and_are_kept_elsewhere(task, tmp_path, monkeypatch, elsewhere):
    run, problems, long = RunFolder(tmp_path / "run"), [], TrainSettings(40, checkpoint_every=5)
    with monkeypatch.context() as broken:
        full(run, broken, begins=5)
        with pytest.raises(TrainingError, match=r"2 checkpoints in a row could not be written.*step 15.*Step 15 is saved in"):
            train(task.adapter(), task, long, run=run, observer=watched(problems))
    assert problems == [f"checkpoint of step {k}: [Errno 28] No space left on device" for k in (10, 15)]
    (folder,) = elsewhere.iterdir()
    for file in folder.iterdir():  # as the message says
        file.replace(run.path / file.name)
    adapter, expected = task.adapter(), task.adapter()
    result = train(adapter, task, long, run=RunFolder(tmp_path / "run"))
    assert result.resumed_from == 15 and len(result.losses) == 40
    train(expected, Restyle(), long)
    assert same(adapter, expected)


def test_the_last_checkpoint_is_kept_elsewhere_and_the_adapter_is_there(task, tmp_path, monkeypatch, elsewhere):
    run, problems = RunFolder(tmp_path / "run"), []
    full(run, monkeypatch)
    assert train(task.adapter(), task, TrainSettings(4), run=run, observer=watched(problems)).step == 4
    assert problems[0].startswith("checkpoint of step 4") and "Step 4 is saved in" in problems[1]
    task.fail_at = {2: KeyboardInterrupt()}
    problems.clear()
    with pytest.raises(KeyboardInterrupt):
        train(task.adapter(), task, TrainSettings(4), run=run, observer=watched(problems))
    assert "Step 2 is saved in" in problems[1] and len(list(elsewhere.iterdir())) == 2


@pytest.mark.parametrize("deleted", ["folder", "parent"])
def test_a_deleted_folder_is_made_again(task, tmp_path, deleted):
    (tmp_path / "runs").mkdir()
    run, problems = RunFolder(tmp_path / "runs" / "run"), []
    watch = watched(problems)
    watch.progress = lambda p: shutil.rmtree(run.path if deleted == "folder" else run.path.parent) if p.step == 3 else None
    adapter, expected = task.adapter(), task.adapter()
    train(adapter, task, TrainSettings(6, checkpoint_every=4), run=run, observer=watch)
    train(expected, Restyle(), TrainSettings(6))
    assert same(adapter, expected)
    assert len(problems) == 1 and "is gone, deleted or renamed" in problems[0]
    assert [line["step"] for line in RunFolder(run.path).history()] == [1, 2, 3, 4, 5, 6]
    assert train(task.adapter(), task, TrainSettings(6), run=RunFolder(run.path)).resumed_from == 6


@pytest.mark.parametrize("name", ["best.safetensors", "loss.jsonl", "step-000009.safetensors", "mine.safetensors"])
def test_what_cannot_be_written_is_said_before_the_first_step(task, tmp_path, name):
    run = RunFolder(tmp_path / "run", name="mine")
    (run.path / name).mkdir()
    with pytest.raises(OSError, match=f"{name}: cannot be written to .*run"):
        train(task.adapter(), task, TrainSettings(9), run=run)
    assert task.seen == 0 and sorted(path.name for path in run.path.iterdir()) == sorted([".lock", name])


def test_a_name_that_the_disk_refuses(task, tmp_path):
    with pytest.raises(OSError, match="aaa.safetensors: cannot be written"):
        train(task.adapter(), task, TrainSettings(1), run=RunFolder(tmp_path / "run", name="a" * 250))
    assert task.seen == 0


def test_a_disk_too_small_for_a_checkpoint_is_said_before_the_first_step(tmp_path):
    """A real refusal: files of this process may not become larger."""
    resource = pytest.importorskip("resource")
    code = (
        "import resource, sys; sys.path[:0] = ['tests/core', '.']\n"
        "from test_train import Restyle, RunFolder, TrainSettings, train\n"
        "task = Restyle(4096); run = RunFolder(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))\n"
        "try: train(task.adapter(), task, TrainSettings(2), run=run)\n"
        "except OSError as error: print(error, task.seen, len(list(run.path.iterdir())))\n"
    )
    assert resource.RLIM_INFINITY is not None
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=root, capture_output=True, text=True)
    assert "resume.state: cannot be written" in done.stdout and "File too large 0 1" in done.stdout, done.stdout + done.stderr


def test_a_finished_run_is_read_where_nothing_can_be_written(task, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    train(task.adapter(), task, TrainSettings(3), run=run)
    monkeypatch.setattr(run, "try_writing", lambda *_: pytest.fail("there is nothing to write"))
    assert train(task.adapter(), task, TrainSettings(3), run=run).step == 3


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty", "gone"])
def test_a_damaged_state_leaves_the_one_before_it(task, tmp_path, damage):
    run, problems = RunFolder(tmp_path / "run"), []
    settings = TrainSettings(9, checkpoint_every=3)
    task.fail_at = {8: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        train(task.adapter(), task, settings, run=run)
    content = bytearray(run.state_file.read_bytes())
    content[-3] ^= 1  # in a number of a tensor: the file is still whole to safetensors
    match damage:
        case "gone":
            run.state_file.unlink()
        case _:
            run.state_file.write_bytes({"cut": content[:-8], "one bit": content, "empty": b""}[damage])
    adapter, expected, again = task.adapter(), task.adapter(), Restyle()
    result = train(adapter, again, settings, run=RunFolder(tmp_path / "run"), observer=watched(problems))
    assert result.resumed_from == 6 and len(result.losses) == 9
    train(expected, Restyle(), settings)
    assert same(adapter, expected)
    if damage != "gone":
        assert "run/resume.state: damaged" in problems[0] and "going on from resume.previous.state, at step 6" in problems[0]


@pytest.mark.parametrize("version", [1, 3])
def test_a_state_of_an_older_version_goes_on(task, tmp_path, version):
    """Of before there were checksums, and with what the plan did not know then left out; and with another hash of the images."""
    run = RunFolder(tmp_path / "run")
    train(task.adapter(), task, TrainSettings(3), run=run)
    with safe_open(run.state_file, framework="pt") as file:
        header = json.loads(file.metadata()["styleinject_training"])
    tensors = load_file(run.state_file)
    header["version"] = version
    if version == 1:
        del header["plan"]["data"]["images"]
    else:
        task.content, header["plan"]["data"]["content"] = "whole", "ends"
    text = json.dumps(header)
    save_file(tensors, run.state_file, {"styleinject_training": text, "checksum": checksum(tensors, text)})
    assert train(task.adapter(), task, TrainSettings(5), run=RunFolder(tmp_path / "run")).resumed_from == 3


def test_an_optimizer_that_lost_a_part_is_noticed_without_a_checksum(task, tmp_path):
    run = RunFolder(tmp_path / "run")
    train(task.adapter(), task, TrainSettings(3), run=run)
    with safe_open(run.state_file, framework="pt") as file:
        text = file.metadata()["styleinject_training"]
    header = json.loads(text.replace('"exp_avg_sq"', '"exp_avg_squared"'))
    save_file(load_file(run.state_file), run.state_file, {"styleinject_training": json.dumps({**header, "version": 1})})
    with pytest.raises(CheckpointError, match=r"run/resume.state: not the state of such a run \('exp_avg_sq'\)"):
        train(task.adapter(), task, TrainSettings(5), run=RunFolder(tmp_path / "run"))


def test_the_best_is_kept_and_patience_ends(task, tmp_path):
    values = iter([5.0, 3.0, 4.0, 3.5, 1.0])
    task.validation_loss = lambda: next(values)
    adapter, states, watch = task.adapter(), {}, Observer()
    watch.progress = lambda p: states.update({p.step: {k: v.clone() for k, v in adapter.state_dict().items()}})
    settings = TrainSettings(50, validate_every=3, patience=2)
    result = train(adapter, task, settings, run=RunFolder(tmp_path / "run"), observer=watch)
    assert result.stopped_early
    assert (result.step, result.best_step) == (12, 6)
    assert result.validation == [(3, 5.0), (6, 3.0), (9, 4.0), (12, 3.5)]
    assert all(torch.equal(v, states[6][k]) for k, v in adapter.state_dict().items())
    assert load_adapter(tmp_path / "run" / "best.safetensors").metadata["styleinject.steps"] == "6"
    again = train(task.adapter(), task, settings, run=RunFolder(tmp_path / "run"))
    assert (again.step, again.stopped_early) == (12, True)


def test_pictures_are_asked_for_without_changing_the_run(task):
    asked, watch = [], Observer()

    def sample(step):
        assert not torch.is_grad_enabled()
        assert "forward" in task.host["to_q"].__dict__
        asked.append(step)
        torch.rand(3)

    watch.sample = sample
    adapter, plain = task.adapter(), task.adapter()
    train(adapter, task, TrainSettings(10, sample_every=4), observer=watch)
    train(plain, task, TrainSettings(10))
    assert asked == [4, 8]
    assert same(adapter, plain)


def test_half_precision_scales_the_loss(task):
    """Gradients that float16 would lose: the same steps as without, to rounding."""
    task.is_float16 = True
    scaled, plain = task.adapter(), task.adapter()
    train(scaled, task, TrainSettings(5))
    task.is_float16 = False
    train(plain, task, TrainSettings(5))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], value)


def test_another_processes_overflow_is_everyones(task):
    """float16: the scaler leaves the step out where any process's gradient is too large, and lowers its scale everywhere."""

    class TwoProcesses(Processes):
        overflow = True

        def average(self, tensors):
            if self.overflow:
                tensors[0].flatten()[0] = torch.inf
            object.__setattr__(self, "overflow", False)

    task.is_float16 = True
    adapter, before, after = task.adapter(), task.adapter(), []
    watch = Observer()
    watch.progress = lambda p: after.append({k: v.clone() for k, v in adapter.state_dict().items()})
    train(adapter, task, TrainSettings(3), observer=watch, processes=TwoProcesses())
    assert all(torch.equal(v, after[0][k]) for k, v in before.state_dict().items())
    assert not all(torch.equal(v, after[2][k]) for k, v in before.state_dict().items())
    assert all(v.isfinite().all() for v in after[2].values())


def test_overflows_without_end_are_an_error(task):
    task.is_float16 = True
    loss = task.loss
    task.loss = lambda rng: (lambda value: value + (0 * value).sqrt())(loss(rng))  # finite, and its gradients are not
    adapter = task.adapter()
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    with pytest.raises(TrainingError, match="gradient became .* at step 40 of 100"):
        train(adapter, task, TrainSettings(100))
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())


def test_schedule_free_parameters_come_back_bit_for_bit():
    pytest.importorskip("schedulefree")
    parameter = nn.Parameter(torch.randn(5))
    optimizer = make_optimizer([parameter], TrainSettings(optimizer="schedulefree"))
    for _ in range(3):
        parameter.grad = torch.randn(5)
        optimizer.step()
    before = parameter.detach().clone()
    with evaluating(optimizer):
        assert not torch.equal(parameter, before)
    assert torch.equal(parameter, before)


def test_settings_are_checked():
    for wrong, message in [
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a positive number, found nan"),
        ({"schedule": "cosin"}, "schedule: expected one of constant, cosine, linear, found 'cosin'"),
        ({"optimizer": "sgd"}, "optimizer: expected one of adamw"),
        ({"caption_dropout": 2}, "caption_dropout: expected 0 to 1"),
        ({"patience": 3}, "patience: expected validate_every with it"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainSettings(**wrong)
    rates = [TrainSettings(100, warmup=10, schedule="cosine").rate(k) for k in (0, 9, 50, 99)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[2] == pytest.approx(0.5)
    assert rates[1] > 0.95 > 0.01 > rates[3]


def test_an_optimizer_that_is_not_installed(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        make_optimizer([nn.Parameter(torch.zeros(1))], TrainSettings(optimizer="adamw8bit"))


def test_a_state_does_not_change_with_its_file(task, tmp_path):
    """It is replaced while a resumed run goes on; a mapped file could not be, on Windows."""
    folder = RunFolder(tmp_path / "run")
    settings = TrainSettings(3, validate_every=1)
    train(task.adapter(), task, settings, run=folder)
    plan = run_plan(task.adapter(), task, settings)
    state, expected = folder.load_state(plan, 3), folder.load_state(plan, 3)
    tensors = [v for part in (state, expected) for v in (part.parts["best"][2], part.parts["adapter"])]
    size = folder.state_file.stat().st_size
    with folder.state_file.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    for one, other in zip(tensors[:2], tensors[2:], strict=True):
        assert all(torch.isfinite(v).all() and torch.equal(v, other[k]) for k, v in one.items())


def test_two_runs_do_not_train_in_one_folder(task, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        assert RunFolder(tmp_path / "run").is_busy
        with pytest.raises(CheckpointError, match="run: another run is training in this folder"):
            train(task.adapter(), task, SETTINGS, run=RunFolder(tmp_path / "run"))
    assert not folder.is_busy and not folder.loss_file.exists()
    busy = []
    watch = Observer()
    watch.progress = lambda _: busy.append(RunFolder(tmp_path / "run").is_busy)
    train(task.adapter(), task, TrainSettings(2), run=folder, observer=watch)
    assert busy == [True, True] and not folder.is_busy


def test_a_file_system_without_locks(task, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder(tmp_path / "run")
    assert not folder.is_busy
    assert train(task.adapter(), task, TrainSettings(1), run=folder).step == 1


def test_a_validation_that_is_no_number_is_never_the_best(task):
    values = iter([float("nan"), 0.9, 0.5, float("inf"), 0.7])
    task.validation_loss = lambda: next(values)
    said = []
    watch = Observer()
    watch.problem = said.append
    result = train(task.adapter(), task, TrainSettings(5, validate_every=1), observer=watch)
    assert result.best_step == 3
    assert said == ["the validation loss of step 1 is nan", "the validation loss of step 4 is inf"]
    task.validation_loss = lambda: float("nan")
    result = train(task.adapter(), task, TrainSettings(9, validate_every=1, patience=3))
    assert result.best_step is None and result.stopped_early and result.step == 3


def test_layers_without_a_gradient_are_no_secret(task, tmp_path):
    """As those before an attention without a backward pass; the others would learn, and the loss fall."""
    task.host["to_v"] = nn.Linear(8, 6).requires_grad_(False)
    adapter = Adapter.create(task.host, AdapterConfig(r=2, n_styles=2, target_modules=("to_q", "to_v")))
    with pytest.raises(TrainingError, match=r"no gradient reaches 1 of 2 layers \(to_v\).*No checkpoint had been written"):
        train(adapter, task, TrainSettings(3), run=RunFolder(tmp_path / "run"))
    adapter.layers["to_v"].requires_grad_(False)
    assert train(adapter, task, TrainSettings(1)).step == 1, "a frozen one is left out on purpose"
    names = [f"to_{letter}" for letter in "abcde"]
    task.host.update({name: nn.Linear(8, 6).requires_grad_(False) for name in names})
    task.loss = lambda _: sum(task.host[name](task.x).square().mean() for name in ("to_q", *names))
    most = Adapter.create(task.host, AdapterConfig(r=2, n_styles=2, target_modules=("to_q", "to_v", *names)))
    said, watch = [], Observer()
    watch.problem = said.append
    assert train(most, task, TrainSettings(1), observer=watch).step == 1
    assert "no gradient reaches 1 of 7 layers (to_v): the model's output does not depend on them" in said[0]
    task.loss = lambda _: (task.host["to_q"](task.x).detach() - task.target).square().mean()
    with pytest.raises(TrainingError, match="no gradient reaches 1 of 1 layers"):
        train(task.adapter(), task, TrainSettings(3))


def test_a_run_goes_on_with_less_memory(task, tmp_path):
    folder = RunFolder(tmp_path / "run")
    train(task.adapter(), task, TrainSettings(3), run=folder)
    result = train(task.adapter(), task, TrainSettings(5, gradient_checkpointing=True), run=folder)
    assert result.resumed_from == 3 and result.step == 5
