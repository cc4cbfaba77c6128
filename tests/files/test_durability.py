"""Processes that are killed while they train and save, and what is left of their files."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import killed
import multilora as ml
from adapter_files import contents
from command import numbers
from multilora import atomic, checkpoint, particle_folders
from multilora.app import resume as run_state
from multilora.app import run as training
from multilora.app import steps

METHODS = ("ibdr", "svgd", "ensemble")
STEPS, SAVE_EVERY = killed.STEPS, killed.SAVE_EVERY

# Processes are forked from one that has imported everything and computed nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["multilora.app.run", "peft", "torchmetrics", "transformers.pytorch_utils"]
)


def start(function, *args, **kwargs):
    process = CONTEXT.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def run(function, *args, **kwargs):
    """The exit code of function(...) in a new process; negative for a signal."""
    process = start(function, *args, **kwargs)
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def outcome(out):
    """Everything that a run decides: its numbers but for the clock's, and its adapters."""
    adapters = contents(out)
    return numbers(out), {name: adapters[name] for name in adapters if name.startswith("particle_")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of uninterrupted runs, by method."""
    path = tmp_path_factory.mktemp("whole")
    for method in METHODS:
        assert run(killed.train, path / method, method) == 0
    return {method: outcome(path / method) for method in METHODS}


# --- runs ----------------------------------------------------------------------------------------

# In a seeded order, and each method at the ends too.
KILLS = [("step", step) for step in random.Random(0).sample(range(2, STEPS), 15)]
KILLS += [("step", 1), ("step", SAVE_EVERY), ("step", STEPS)]
# While the state is written (the first, a later, the last one), while the adapters are written, and
# while they are moved into place.
KILLS += [("state", 1), ("state", 3), ("state", 5), ("adapters", 2), ("moves", 1), ("moves", 9)]
# A moment in the middle, the end, and each kind of write are quick; the other moments are slow.
QUICK = (2, 17, 19, 21, 22)
CASES = [
    pytest.param(METHODS[i % 3], *kill, marks=() if i in QUICK else pytest.mark.slow)
    for i, kill in enumerate(KILLS)
]


@pytest.mark.parametrize(("method", "where", "count"), CASES)
def test_a_killed_run_ends_as_the_whole_one(method, where, count, whole, tmp_path):
    out = tmp_path / "run"
    assert run(killed.train, out, method, (where, count)) == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    checkpoint = out / "checkpoint.pt"
    if where == "step":
        saved = (count - 1) // SAVE_EVERY * SAVE_EVERY
        assert not list(out.glob(".*"))
    elif where == "state":
        saved = min((count - 1) * SAVE_EVERY, STEPS)
        (half,) = out.glob(".checkpoint.pt.*.tmp")
        with pytest.raises(ValueError, match="damaged"):
            run_state.read_state(half)
    else:
        saved = STEPS
        assert [f.name.rstrip("0123456789abcdef") for f in out.glob(".*")] == [
            {"adapters": atomic._STAGING, "moves": atomic._COMMIT}[where]
        ]
    assert checkpoint.exists() == (saved > 0)
    assert saved == 0 or run_state.read_state(checkpoint)["step"] == saved
    assert run(killed.train, out, method) == 0
    assert outcome(out) == whole[method]
    assert not list(out.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ibdr", "svgd"])
def test_a_run_killed_again_and_again_ends_as_the_whole_one(method, whole, tmp_path):
    out = tmp_path / "run"
    for kill in [("step", 5), ("state", 2), ("step", 8), ("step", 16), ("state", 1), ("step", 23)]:
        assert run(killed.train, out, method, kill) == -signal.SIGKILL
    for kill in [("adapters", 1), ("moves", 5), ("moves", 3), ("adapters", 3)]:
        assert run(killed.train, out, method, kill) == -signal.SIGKILL
    assert run(killed.train, out, method) == 0
    assert outcome(out) == whole[method]


def test_a_run_killed_at_any_moment_ends_as_the_whole_one(whole, tmp_path):
    out, moments = tmp_path / "run", random.Random(1)
    # The pauses alone are thrice all the time that the run is given, so that it cannot end.
    delays = [moments.uniform(0.1, 0.5) for _ in range(6)]
    pause = 3 * sum(delays) / STEPS
    for delay in delays:
        process = start(killed.train, out, "ibdr", save_every=1, pause=pause)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert run(killed.train, out, "ibdr") == 0
    assert outcome(out) == whole["ibdr"]


# --- adapter folders -----------------------------------------------------------------------------


def seeds_in(path):
    """The seeds of the numbers that are in the folder, as multilora reads it."""
    model = ml.load_particle_model(killed.small_task().base, path)
    return {value for p in model.particle_parameters() for value in p.unique().tolist()}


@pytest.mark.slow
def test_a_save_killed_anywhere_leaves_one_whole_set(tmp_path):
    old = tmp_path / "old"
    killed.particles(1).save_pretrained(old)
    (old / "metrics.json").write_text("{}")
    (old / "particle_0" / "README.md").write_text("of the user")
    found = []
    for count in itertools.count(1):
        path = tmp_path / f"killed {count}"
        shutil.copytree(old, path)
        code = run(killed.save, path, 2, count)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        left = contents(path)
        found.append(seeds_in(path))
        # Reading does not write.
        assert contents(path) == left
        killed.particles(3).save_pretrained(path)
        assert seeds_in(path) == {3}
        assert contents(path).keys() == contents(old).keys()
        assert (path / "particle_0" / "README.md").read_text() == "of the user"
        shutil.rmtree(path)
    # First all old, then all new, and never both.
    news = found.index({2})
    assert found == [{1}] * news + [{2}] * (len(found) - news)
    # One change of the file system makes the difference; there are many before and after it.
    assert news > 10 and len(found) - news > 10


def test_a_first_save_killed_anywhere_is_missing_or_whole(tmp_path):
    found = []
    for count in itertools.count(1, 3):
        path = tmp_path / f"killed {count}"
        if run(killed.save, path, 2, count) == 0:
            break
        try:
            found.append(seeds_in(path))
        except FileNotFoundError as error:
            assert "multilora.json is missing" in str(error)
            found.append(None)
    news = found.index({2})
    assert found == [None] * news + [{2}] * (len(found) - news)


def test_two_processes_that_save_to_one_folder_do_not_mix(tmp_path):
    killed.particles(1).save_pretrained(tmp_path)
    writers = [start(killed.keep_saving, tmp_path, (seed,), 2.0) for seed in (1, 2)]
    found = []
    while any(writer.is_alive() for writer in writers):
        found.append(seeds_in(tmp_path))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert found and all(seeds in ({1}, {2}) for seeds in found)
    assert seeds_in(tmp_path) in ({1}, {2})


@pytest.mark.slow
@pytest.mark.parametrize("what", ["particles", "in place", "folders", "soup"])
def test_a_reader_beside_a_saver_finds_one_set_or_the_other(what, tmp_path):
    folders = [tmp_path] if what == "soup" else [tmp_path / f"particle_{k}" for k in range(3)]
    model, saved = killed.particles(0), "soup" if what == "soup" else "particles"
    first = killed.particles(1)
    first.soup(tmp_path) if what == "soup" else first.save_pretrained(tmp_path)
    writer = start(killed.keep_saving, tmp_path, (1, 2), 2.5, saved)
    found = []
    while writer.is_alive():
        if what == "in place":
            checkpoint.load_particles(model, tmp_path)
        else:
            path = tmp_path if what == "particles" else folders
            model = ml.load_particle_model(killed.small_task().base, path)
        heads = model.heads()[0][1]["bias"]
        # A soup has other numbers in its factors; each folder is a separate set.
        found += [{head.unique().item()} for head in heads] if what != "particles" else [
            {value for p in model.particle_parameters() for value in p.unique().tolist()}
        ]  # fmt: skip
    assert writer.exitcode == 0
    assert {1} in found and {2} in found and all(seeds in ({1}, {2}) for seeds in found)


def test_a_damaged_set_that_was_not_moved_is_named(tmp_path, monkeypatch):
    killed.particles(1).save_pretrained(tmp_path / "next")
    os.makedirs(tmp_path / "saved")
    commit = tmp_path / "saved" / atomic._COMMIT
    os.rename(tmp_path / "next", commit)
    assert seeds_in(tmp_path / "saved") == {1}
    file = commit / "particle_1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    readings, read = [], particle_folders._read_root
    monkeypatch.setattr(
        particle_folders, "_read_root", lambda root: readings.append(0) or read(root)
    )
    with pytest.raises(ValueError, match=r"particle_1/adapter_model\.safetensors is damaged"):
        seeds_in(tmp_path / "saved")
    # Nobody has moved anything, so that it is not read again.
    assert len(readings) == 1


def test_a_folder_that_is_never_still_is_given_up(tmp_path):
    readings = []

    def read():
        readings.append(0)
        atomic.write_text(tmp_path / "marker", str(len(readings)))
        raise ValueError("half of this, half of that")

    with pytest.raises(ValueError, match=f"{tmp_path.name} is saved to faster than it can be read"):
        atomic.read_set(tmp_path, "marker", read)
    assert len(readings) == atomic._ATTEMPTS


def test_a_soup_is_replaced_as_a_whole(tmp_path):
    model = killed.particles(1)
    model.soup(tmp_path)
    (tmp_path / "README.md").write_text("of the user")
    before = contents(tmp_path)
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    # Committed, and killed before the files were moved.
    killed.particles(2).soup(tmp_path / "next")
    os.rename(tmp_path / "next", tmp_path / atomic._COMMIT)
    loaded = ml.load_particle_model(killed.small_task().base, [tmp_path])
    assert loaded.heads()[0][1]["bias"].unique().tolist() == [2.0]
    model.soup(tmp_path)
    assert contents(tmp_path) == before


def test_contents_are_on_the_disk_before_a_rename_shows_them(tmp_path, monkeypatch):
    synced, shown = set(), []

    def fsync(descriptor, real=os.fsync):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    def checked(rename):
        def renamed(source, target):
            source = Path(source)
            inside = [source, *source.rglob("*")]
            if source.name != atomic._COMMIT and atomic._COMMIT not in source.parts:
                assert {str(f) for f in inside} <= synced
            rename(source, target)
            shown.append(Path(target).name)

        return renamed

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", checked(os.rename))
    monkeypatch.setattr(os, "replace", checked(os.replace))
    killed.particles(1).save_pretrained(tmp_path / "made" / "here")
    assert shown[0] == atomic._COMMIT and len(shown) == 1 + 2 * 3 + 1
    # The names as well: of the folders, of the commit, and of what was moved out of it.
    for folder in (".", "made", "made/here", "made/here/particle_2"):
        assert str((tmp_path / folder).resolve()) in synced
    atomic.write_text(tmp_path / "note.json", "{}")
    assert shown[-1] == "note.json"


# --- damaged runs --------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(training, "make_task", killed.small_task)
    monkeypatch.setattr(training, "write_pictures", lambda *_: None)


def stopped(out, **changes):
    """A run that was stopped after its checkpoint of step 2."""

    def stop(step, steps, stats):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(killed.settings(**changes), out, save_every=2, on_step=stop)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A stopped IBDR run, and others that differ from it."""
    path = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_task", killed.small_task)
        stopped(path / "run")
        stopped(path / "svgd", method="svgd")
        stopped(path / "particles", particles=2)
        stopped(path / "lr", lr=0.5)
        wide = killed.small_task()
        wide.base[0].weight.data += 1
        patch.setattr(training, "make_task", lambda *_: wide)
        stopped(path / "base")
    return path


def _state(edit):
    """Another state, whole and with right checksums."""

    def damage(out):
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        edited = edit(state)
        torch.save(state if edited is None else edited, out / "checkpoint.pt")

    return damage


def _set(*keys, value):
    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return _state(edit)


def _drop(*keys):
    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return _state(edit)


def _write(name, content):
    return lambda out: (out / name).write_bytes(content)


def _half(name):
    def damage(out):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[: len(content) // 2])

    return damage


def _flip(out):
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    content = bytearray((out / "checkpoint.pt").read_bytes())
    content[content.find(state["rng"].numpy().tobytes()) + 100] ^= 4
    (out / "checkpoint.pt").write_bytes(content)
    # torch itself does not see it.
    torch.load(out / "checkpoint.pt", weights_only=True)


def _from(other):
    def damage(out):
        shutil.copy(out.parent.parent / "others" / other / "checkpoint.pt", out)

    return damage


def _setting(**changes):
    def damage(out):
        values = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps(values | changes))

    return damage


A = "base.0.lora_A"
STATE, RUN = "checkpoint.pt", "run.json"

# The damage to the run, and the words that the message must contain.
DAMAGE = {
    "truncated": (_half(STATE), [STATE, "is damaged"]),
    "empty": (_write(STATE, b""), [STATE, "is damaged"]),
    "text": (_write(STATE, b"hello"), [STATE, "is damaged"]),
    "flipped": (_flip, [STATE, "is damaged", "checksum"]),
    "list": (_state(lambda state: [1, 2]), [STATE, "list"]),
    "empty-state": (_state(lambda state: {}), [STATE, "lacks", "parameters", "optimizer"]),
    "no-optimizer": (_drop("optimizer"), [STATE, "lacks ['optimizer']"]),
    "no-python-rng": (_drop("python_rng"), [STATE, "lacks ['python_rng']"]),
    "of-svgd": (_from("svgd"), [STATE, "'method': ('svgd', 'ibdr')"]),
    "of-two-particles": (_from("particles"), [STATE, "'particles': (2, 3)"]),
    "of-another-rate": (_from("lr"), [STATE, "'lr': (0.5, 0.003)"]),
    "of-another-base": (_from("base"), [STATE, "another base model"]),
    "step-beyond": (_set("step", value=STEPS + 1), [STATE, f"step {STEPS + 1} of {STEPS}"]),
    "step-text": (_set("step", value="2"), [STATE, "step '2'"]),
    "too-few-times": (_set("step_ms", value=[1.0]), [STATE, "step 2", "1 times"]),
    "no-lora-A": (_drop("parameters", A), [STATE, "parameters has", A]),
    "other-name": (_set("parameters", "x", value=torch.zeros(2)), [STATE, "'x'"]),
    "other-shape": (
        _set("parameters", A, value=torch.zeros(3, 2, 7)),
        [STATE, A, "(3, 2, 7)", "(3, 2, 6)"],
    ),
    "number-for-tensor": (_set("parameters", A, value=1.5), [STATE, A, "float", "(3, 2, 6)"]),
    "no-lambda": (_drop("method", "lambda"), [STATE, "method has", "lambda"]),
    "method-of-nothing": (_set("method", value={}), [STATE, "method has []"]),
    "sigma-of-two": (
        _set("method", "log_sigma", value=torch.zeros(2)),
        [STATE, "method.log_sigma", "(2,)", "(3,)"],
    ),
    "optimizer-list": (_set("optimizer", value=[]), [STATE, "optimizer has list"]),
    "fresh-optimizer": (_set("optimizer", "state", value={}), [STATE, "optimizer.state has []"]),
    "no-moment": (
        _drop("optimizer", "state", 1, "exp_avg"),
        [STATE, "optimizer.state.1 has", "exp_avg"],
    ),
    "moment-of-other-shape": (
        _set("optimizer", "state", 0, "exp_avg_sq", value=torch.zeros(3, 2, 7)),
        [STATE, "optimizer.state.0.exp_avg_sq", "(3, 2, 7)", "(3, 2, 6)"],
    ),
    "optimizer-of-fewer": (
        _set("optimizer", "param_groups", 0, "params", value=[0]),
        [STATE, "the state of the optimizer does not fit"],
    ),
    "no-schedule": (_set("schedule", value={}), [STATE, "state of the schedule does not fit"]),
    "other-rng": (
        _set("rng", value=torch.zeros(3, dtype=torch.uint8)),
        [STATE, "the random state does not fit"],
    ),
    "other-python-rng": (_set("python_rng", value=(3, (1,), None)), [STATE, "random state"]),
    "half-of-the-settings": (_half(RUN), [RUN, "is damaged"]),
    "settings-list": (_write(RUN, b"[]"), [RUN, "is damaged"]),
    "settings-binary": (_write(RUN, b"\xff\xfe\x00"), [RUN, "is damaged"]),
    "unknown-setting": (_setting(colour="blue"), [RUN, "is damaged", "colour"]),
    "unknown-method": (_setting(method="magic"), [RUN, "is damaged", "magic"]),
    "text-for-steps": (_setting(steps="many"), [RUN, "is damaged"]),
    "other-settings": (_setting(lr=0.5), ["other settings", "'lr': (0.5, 0.003)"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_named(damage, runs, small, tmp_path, monkeypatch):
    do, named = DAMAGE[damage]
    out = tmp_path / "run"
    shutil.copytree(runs / "run", out)
    (tmp_path.parent / "others").unlink(missing_ok=True)
    (tmp_path.parent / "others").symlink_to(runs)
    do(out)
    before = contents(out)
    made = []

    def particle_model(*args, real=steps.particle_model):
        made.append(real(*args))
        return made[-1]

    monkeypatch.setattr(steps, "particle_model", particle_model)
    with pytest.raises(ValueError, match=r"checkpoint\.pt|run\.json|other settings") as raised:
        training.train(killed.settings(), out, resume=True)
    for text in named:
        assert text in str(raised.value)
    assert str(out) in str(raised.value)
    # Neither the files nor the model has been changed.
    assert contents(out) == before
    fresh = killed.settings()
    fresh = dict(steps.particle_model(killed.small_task(), fresh).named_parameters())
    for model in made[:-1]:
        assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())


def test_the_undamaged_run_goes_on(runs, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs / "run", out)
    # The rest of a killed write does not get in the way, and is removed.
    (out / ".checkpoint.pt.0123.tmp").write_bytes(b"half")
    training.train(killed.settings(), out, resume=True)
    assert not list(out.glob(".*"))


def test_a_file_in_the_place_of_a_folder(small, tmp_path):
    (tmp_path / "file").write_text("of the user")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="file is a file"):
            training.train(killed.settings(), out)
        with pytest.raises(NotADirectoryError, match="file is a file"):
            killed.particles(1).save_pretrained(out)
    assert (tmp_path / "file").read_text() == "of the user"


def test_evaluation_names_a_damaged_checkpoint(runs, small, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(runs / "run", out)
    with pytest.raises(FileNotFoundError, match=r"multilora\.json is missing"):
        training.load_run(out)
    training.train(killed.settings(), out, resume=True)
    training.load_run(out)
    _half(STATE)(out)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        training.load_run(out)


def test_a_full_disk_leaves_the_older_file(tmp_path):
    file = tmp_path / "run.json"
    atomic.write_text(file, "old")

    def full(stream):
        stream.write(b"half of it")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        atomic.write_file(file, full)
    assert contents(tmp_path) == {"run.json": b"old"}
