"""The command line, end to end on the embedded task and on a folder of images."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import peft
import pytest
import torch

import multilora as ml
from command import numbers, refused
from multilora.app import cli, steps
from multilora.app import run as training
from multilora.app.settings import Settings, recommended
from multilora.app.tasks import digits, images
from multilora.app.tasks.images import default_targets
from multilora.app.tasks.task import Task
from one_by_one import particle_model

SHORT = ["--steps", "24", "--shots", "10", "--save-every", "8", "--lr", "0.02"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The digits ViT is pretrained once for this file, a little and on a third of the data."""
    images, labels = digits._load_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(digits._PRETRAINING, "steps", 150)
        patch.setattr(digits, "_load_digits", lambda: (images[:600], labels[:600]))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished short IBDR run."""
    out = tmp_path_factory.mktemp("runs") / "ibdr"
    assert cli.main(["train", *SHORT, "--particles", "3", "--out", str(out)]) == 0
    return out


def test_train_writes_what_it_promises(run):
    metrics = json.loads((run / "metrics.json").read_text())
    keys = "method particles rank seed accuracy nll ece brier mutual_information step_ms"
    assert set(keys.split()) <= metrics.keys()
    assert metrics["method"] == "ibdr" and metrics["particles"] == 3
    # 5 classes: well above chance after 24 steps means that training and evaluation work together.
    assert metrics["accuracy"] > 0.35
    assert metrics["num_examples"] == 297 - 5 * 10
    model, _, _ = training.load_run(run)
    assert metrics["vendi_weights"] == pytest.approx(ml.metrics.vendi(model.cosines()), rel=1e-5)
    assert {f.name for f in run.glob("*.png")} == {
        "reliability.png",
        "entropies.png",
        "history.png",
    }
    for picture in run.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    for k in range(3):
        assert isinstance(peft.PeftConfig.from_pretrained(run / f"particle_{k}"), peft.LoraConfig)


def test_the_history_has_the_statistics_of_the_steps(run):
    history = json.loads((run / "history.json").read_text())
    assert [row["step"] for row in history] == [*range(1, 25)]
    assert {"loss", "objective", "divergence", "particle_distance"} <= history[0].keys()
    model, _, _ = training.load_run(run)
    with torch.no_grad():
        changes = torch.stack(
            [
                torch.cat([a.scaling * (a.lora_B[k] @ a.lora_A[k]).flatten() for a in adapters])
                for adapters in [model.adapters()]
                for k in range(3)
            ]
        )
    mean = torch.pdist(changes).mean().item()
    assert history[-1]["particle_distance"] == pytest.approx(mean, rel=1e-4)


def test_train_says_where_its_results_are_and_what_they_mean(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", *SHORT, "--method", "single", "--steps", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for text in (f"{out} holds particle_0 (", "ECE: expected", "OOD"):
        assert text in said
    listed = {line.split()[0] for line in said.splitlines() if ".png" in line}
    assert listed == {str(picture) for picture in out.glob("*.png")} and len(listed) == 3


@pytest.mark.slow
def test_the_folder_of_an_older_version(run, tmp_path, capsys):
    """It held the options of all tasks, and its checkpoint no history."""
    old = tmp_path / "run"
    shutil.copytree(run, old)
    others = {"model": None, "data": None, "pretrained": True, "targets": None, "model_args": []}
    others |= {"augment": False, "split": "test", "classes": "answers", "max_length": 512}
    others["targets"] = ["qkv"]  # the digits ignored it
    settings = json.loads((old / "run.json").read_text()) | others
    (old / "run.json").write_text(json.dumps(settings))
    state = torch.load(old / "checkpoint.pt", weights_only=True)
    del state["history"]
    state["settings"] |= others
    torch.save(state, old / "checkpoint.pt")
    assert cli.main(["evaluate", str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == numbers(run)["accuracy"]
    command = ["train", *SHORT, "--particles", "3", "--out", str(old)]
    assert cli.main([*command, "--resume"]) == 0
    assert numbers(old) == numbers(run)
    (old / "run.json").write_text(json.dumps(settings | {"augment": True}))
    refused(["evaluate", old], capsys, "augment = True is for the tasks images, vtab")


def test_evaluate_gives_the_same_measures(run, capsys):
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    metrics = numbers(run)
    assert again["accuracy"] == metrics["accuracy"]
    assert again["nll"] == pytest.approx(metrics["nll"], rel=1e-6)
    assert again["corrupted"]["nll"] == pytest.approx(metrics["corrupted"]["nll"], rel=1e-6)


@pytest.mark.parametrize("kind", ["exact", "svd"])
def test_export_writes_a_peft_adapter(run, tmp_path, kind, capsys):
    assert cli.main(["export", str(run), "--soup", kind, str(tmp_path / "soup")]) == 0
    measure = next(line for line in capsys.readouterr().out.splitlines() if "multilora" in line)
    _, _, *arguments = shlex.split(measure)
    assert cli.main([*arguments[1:], "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    task = digits.make(digits.Options(shots=10), seed=0)
    soup = peft.PeftModel.from_pretrained(task.base, tmp_path / "soup").eval()
    x, y = task.test[:]
    with torch.no_grad():
        accuracy = (soup(x).argmax(-1) == y).float().mean().item()
    assert soup.peft_config["default"].r == (24 if kind == "exact" else 8)
    assert accuracy > 0.3
    assert measured["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert len(measured["member_accuracy"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svgd", "ensemble", "single"])
def test_every_method_trains(method, tmp_path):
    assert cli.main(["train", *SHORT, "--method", method, "--out", str(tmp_path / "run")]) == 0
    metrics = numbers(tmp_path / "run")
    particles = {"svgd": 5, "ensemble": 4, "single": 1}[method]
    assert metrics["particles"] == len(metrics["member_accuracy"]) == particles
    assert metrics["accuracy"] > 0.35


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 8, 13, 24])
def test_a_stopped_run_resumes_to_the_same_numbers(run, tmp_path, stop):
    settings = Settings(steps=24, lr=0.02, particles=3, options=digits.Options(shots=10))

    def interrupt(step, steps, stats):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(settings, tmp_path / "run", save_every=8, on_step=interrupt)
    training.train(settings, tmp_path / "run", save_every=8, resume=True)
    assert numbers(tmp_path / "run") == numbers(run)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["map", "sam", "sgld", "bbb", "blob", "sa_bnn"])
def test_the_baselines_train_and_load_again(method, tmp_path, capsys):
    folder, command = tmp_path / "run", ["train", *SHORT, "--method", method, "--particles", "4"]
    if method == "sgld":  # which would not get far, and draws from a wide posterior of 50 images
        command += ["--lr", "0.3", "--method-args", "temperature=1e-4"]
    assert cli.main([*command, "--out", str(folder)]) == 0
    assert numbers(folder)["accuracy"] > 0.35
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == numbers(folder)["accuracy"]
    # Draws that are saved differ.
    model, _, _ = training.load_run(folder)
    assert all(not torch.equal(*a.lora_A[:2]) for a in model.adapters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bbb", "sgld"])
def test_noise_and_draws_resume_too(method, tmp_path):
    options = digits.Options(shots=4)
    settings = Settings(method=method, steps=6, lr=0.02, particles=2, options=options)

    def interrupt(step, steps, stats):
        if step == 3:
            raise KeyboardInterrupt

    training.train(settings, tmp_path / "whole", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        training.train(settings, tmp_path / "run", save_every=2, on_step=interrupt)
    training.train(settings, tmp_path / "run", save_every=2, resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
    for k in range(2):
        file = f"particle_{k}/adapter_model.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    # A run that has ended draws the same particles when it is resumed once more.
    training.train(settings, tmp_path / "run", save_every=2, resume=True)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_the_learning_rate_of_sgld_is_the_schedules(tmp_path, monkeypatch):
    made, seen, make = [], [], steps.make_method
    monkeypatch.setattr(
        steps, "make_method", lambda *given: (made.append(make(*given)), made[-1])[1]
    )
    options = digits.Options(shots=4)
    settings = Settings(method="sgld", steps=20, lr=0.02, particles=1, options=options)
    training.train(settings, tmp_path, on_step=lambda *_: seen.append(made[0].lr()))
    assert seen[0] == 0.02 and seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 20 and made[0].num_data == 20


def test_each_particle_has_its_part_of_a_batch_that_can_be_shared():
    model = particle_model(3)
    task = Task(model.base, [], None, [], [], [])

    def called(method, x, y, task=task):
        settings = Settings(method=method, particles=3)
        return steps.closure(settings, task, ml.Ensemble(model), x, y)()

    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 4
    logits, targets = called("bbb", x, y)
    assert torch.equal(targets, y.view(3, 2))
    for k in range(3):
        torch.testing.assert_close(logits[k], model(x[2 * k : 2 * k + 2])[k])
    for method, rows in (("bbb", 5), ("ensemble", 6)):
        logits, targets = called(method, x[:rows], y[:rows])
        torch.testing.assert_close(logits, model(x[:rows]))
        assert torch.equal(targets, y[:rows])
    # A task that learns in another way gets the whole batch.
    own = replace(task, learn=lambda model, x, y: (model(x) + 1, y))
    torch.testing.assert_close(called("bbb", x, y, own)[0], model(x) + 1)


def test_a_run_is_not_overwritten_or_continued_as_another(run, capsys):
    assert cli.main(["train", *SHORT, "--particles", "3", "--out", str(run)]) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main(["train", *SHORT, "--out", str(run), "--resume"]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.fixture
def image_folder(tmp_path):
    """Three classes that differ in colour, 10 images each, train/ and val/."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(10):
                pixels = torch.randint(0, 100, (40, 36, 3), generator=generator)
                pixels[..., 2 - channel] += 150
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return tmp_path / "images"


MODEL = ["--model", "vit_tiny_patch16_224", "--no-pretrained", "--model-args"]
MODEL += ["img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]


def test_any_timm_model_on_a_folder_of_images(image_folder, tmp_path):
    out = tmp_path / "run"
    command = ["train", "--data", str(image_folder), *MODEL, "--steps", "30", "--lr", "0.01"]
    assert cli.main([*command, "--particles", "2", "--batch-size", "8", "--out", str(out)]) == 0
    metrics = numbers(out)
    assert metrics["num_examples"] == 30
    assert metrics["accuracy"] > 0.8  # colour is easy
    assert cli.main(["evaluate", str(out)]) == 0


def test_a_flat_folder_is_split(image_folder):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    options = images.Options(
        model="vit_tiny_patch16_224",
        data=str(image_folder / "train"),
        pretrained=False,
        model_args=tuple(sizes.items()),
    )
    task = images.make(options, seed=0)
    assert task.classes == ["blue", "green", "red"]
    assert (len(task.train), len(task.test)) == (24, 6)
    assert (task.targets, task.head) == (["qkv"], "head")


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_numbers(image_folder, tmp_path):
    command = ["train", "--data", str(image_folder), *MODEL]
    command += ["--steps", "60", "--save-every", "5", "--particles", "2"]
    assert cli.main([*command, "--out", str(tmp_path / "whole")]) == 0

    # One thread, as the tests have: another number may round differently.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "multilora", *command]
    process = subprocess.Popen([*program, "--out", str(tmp_path / "killed")], env=env)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert cli.main([*command, "--out", str(tmp_path / "killed"), "--resume"]) == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume"], "--resume needs --out"),
        (["--task", "nonsense", "--out", "{tmp}"], "nonsense"),
        (["--model", "vit_tiny_patch16_224", "--out", "{tmp}"], "both --model and --data"),
        (["--data", "{tmp}/none", *MODEL, "--out", "{tmp}/run"], "does not exist"),
        (["--method", "single", "--particles", "3", "--out", "{tmp}"], "1 particle; got 3"),
        (["--steps", "0", "--out", "{tmp}"], "steps must be an integer in [1"),
        (
            ["--save-every", "0", "--out", "{tmp}/run"],
            "save_every must be an integer in [1",
        ),
        (["--method-args", "alpha=abc", "--out", "{tmp}/run"], "alpha of ibdr is a number"),
    ],
)
def test_train_says_what_is_wrong(arguments, message, tmp_path, capsys):
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    assert cli.main(["train", "--steps", "2", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--shots", "9999"], "shots must be"),
        (["--task", "images"], "the task 'images' needs both --model and --data"),
        (["--task", "digits", "--model", "vit"], "model = 'vit' is for the tasks images, vtab"),
        (["--model", "vit", "--data", "d", "--shots", "2"], "shots = 2 is for the tasks digits"),
    ],
)
def test_an_error_is_one_line_without_a_progress_bar(tmp_path, capsys, arguments, text):
    digits.make(digits.Options(), 0)  # pretrains the model, which is reported
    capsys.readouterr()
    assert cli.main(["train", *arguments, "--out", str(tmp_path / "run")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("multilora: ") and text in line


@pytest.mark.slow
def test_a_run_that_never_began_leaves_its_folder_free(tmp_path, capsys):
    command = ["train", *SHORT, "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--method-args", "loss=nonsense"]) == 1
    assert 'loss must be "particle",' in capsys.readouterr().err
    assert cli.main(command) == 0


def test_a_wrong_method_argument_is_found_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "make_task", None)  # it would pretrain the base
    out = tmp_path / "run"
    assert cli.main(["train", *SHORT, "--out", str(out), "--method-args", "alfa=1"]) == 1
    assert "ibdr has the arguments" in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
def test_particles_are_evaluated_in_the_chunks_of_training(image_folder, tmp_path, monkeypatch):
    command = ["train", "--data", str(image_folder), *MODEL, "--steps", "2", "--particles", "3"]
    numbers_of, chunks = {}, []
    in_chunks = ml.ParticleModel.in_chunks
    monkeypatch.setattr(
        ml.ParticleModel,
        "in_chunks",
        lambda self, chunk, run: (chunks.append(chunk), in_chunks(self, chunk, run))[1],
    )
    for name, more in (("whole", []), ("chunks", ["--method-args", "particle_chunk=2"])):
        assert cli.main([*command, *more, "--out", str(tmp_path / name)]) == 0
        numbers_of[name] = numbers(tmp_path / name)
    assert chunks == [3, 2]
    assert numbers_of["chunks"]["nll"] == pytest.approx(numbers_of["whole"]["nll"], rel=1e-4)
    assert cli.main(["evaluate", str(tmp_path / "chunks")]) == 0
    assert chunks == [3, 2, 2]


def test_a_run_over_another_base_is_refused(run, monkeypatch, capsys):
    monkeypatch.setitem(digits._PRETRAINING, "steps", 3)
    assert cli.main(["evaluate", str(run)]) == 1
    assert "trained over another base model" in capsys.readouterr().err


def test_other_commands_say_what_is_wrong(tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path)]) == 1
    assert "run.json is missing" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{")
    assert cli.main(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "run.json is damaged" in capsys.readouterr().err


def test_version_and_help(capsys):
    for arguments, text in ((["--version"], ml.__version__), (["train", "--help"], "start with")):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 0 and text in capsys.readouterr().out


def test_every_option_is_explained():
    (commands,) = (a for a in cli._parser()._actions if isinstance(a.choices, dict))
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, (name, action.dest)


def test_info_lists_backends_and_versions(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "reference: available" in text
    assert "triton: available" in text  # in the interpreter, as all tests
    assert "cpu: available" in text and "multilora._C_cuda: " in text
    assert "used by default: cpu on a CPU, reference on a GPU" in text
    assert "Triton kernels: experimental" in text


def test_without_qkv_all_linears_of_tokens_are_targets():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model.append(torch.nn.Conv2d(2, 2, 1))
    assert default_targets(model, {"0": 3, "1": 4, "2": 4}) == ["0", "1"]
    assert default_targets(model, {"0": 2, "2": 4}) == ["0", "2"]
    with pytest.raises(ValueError, match="ModuleList has no layer that particles can adapt"):
        default_targets(model, {})


def test_the_batch_of_draws_is_a_multiple_of_them():
    # 16 is the default, and the batch is split among ten draws.
    for method, size in (("bbb", 20), ("sa_bnn", 20), ("ensemble", 16)):
        assert recommended("digits", method).batch_size == size
    assert recommended("digits", "bbb", particles=4).batch_size == 16
    assert recommended("digits", "bbb", batch_size=16).batch_size == 16


@pytest.mark.parametrize(
    "more, message",
    [
        ({"method": "sgld", "method_args": (("lr", 0.1),)}, "sgld has the arguments"),
        ({"method": "sgld", "method_args": (("accumulation", 2),)}, "sgld has the arguments"),
        ({"method": "mutual", "method_args": (("total_steps", 2),)}, "mutual has the arguments"),
    ],
    ids=str,
)
def test_what_other_settings_decide_is_no_argument_of_the_method(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        training.train(Settings(**more), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"method": "mc_dropout", "particles": 3}, "mc_dropout needs lora_dropout > 0"),
        ({"method": "blob", "full": True}, "blob needs adapters"),
        ({"method": "dverge", "full": True}, "dverge needs adapters"),
    ],
    ids=str,
)
def test_settings_that_would_do_nothing(more, message):
    with pytest.raises(ValueError, match=message):
        Settings(**more)
