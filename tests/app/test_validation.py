"""Validation while a run trains: what it measures, chooses, stops, and leaves alone."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import killed
import multilora as ml
from adapter_files import contents
from command import numbers, refused
from multilora.app import cli, plots, report, validation
from multilora.app import run as training
from multilora.app.resume import read_state
from multilora.app.tasks import digits

STEPS = 24
#: Methods with noise, with a posterior of their own, and with masks when they predict.
METHODS = {
    "ensemble": {},
    "ibdr": {"method_args": (("sigma", 0.05),)},
    "bbb": {"method_args": (("kl_weight", 0.01),)},
    "mc_dropout": {"lora_dropout": 0.05},
    "sgld": {},
    "svgd": {},
}


def some(values, *quick):
    """Parameters, of which all but the quick ones are slow."""
    return [pytest.param(v, marks=() if v in quick else pytest.mark.slow) for v in values]


def drawn(examples, seed):
    """Rows of four classes, a fifth of which has another class than the rest would have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 6, generator=generator)
    y = (x[:, :4] + 0.5 * x[:, 2:]).argmax(1)
    wrong = torch.rand(examples, generator=generator) < 0.2
    return x, torch.where(wrong, torch.randint(0, 4, (examples,), generator=generator), y)


def task(own=False, **changes):
    """Augmented training examples, and validation examples of its own or none.

    With those, the training examples are few and mostly mislabelled, so that the last step is not
    the best one.
    """
    x, y = drawn(24, 1)
    mislabelled = x, torch.where(torch.arange(24) % 2 == 0, y.roll(1), y)
    made = replace(
        killed.small_task(),
        train=killed.Augmented(*(mislabelled if own else drawn(100, 1))),
        test=TensorDataset(*drawn(160, 2)),
        validation=TensorDataset(*drawn(64, 3)) if own else None,
    )
    return replace(made, **changes)


@pytest.fixture
def use(monkeypatch):
    """use(own=..., ...) puts this `task` in the place of the digits; there is task() at first."""

    def put(**changes):
        monkeypatch.setattr(digits, "make", lambda *_: task(**changes))

    put()
    return put


def settings(method="ensemble", **changes):
    given = {"particles": 3, "rank": 2, "steps": STEPS, "batch_size": 8, "lr": 0.1}
    return training.Settings(method=method, **given | METHODS.get(method, {}) | changes)


def train(chosen, out, **how):
    training.train(chosen, out, **{"pictures": False, "save_every": 4, "report": list} | how)
    return numbers(out)


def history(out):
    return json.loads((out / "history.json").read_text())


def measured(out):
    """[(step, validation NLL)] of a run."""
    return [(r["step"], r["validation_nll"]) for r in history(out) if "validation_nll" in r]


def particles(out):
    return {n: f for n, f in contents(out).items() if n.startswith("particle_")}


# --- what it leaves alone ------------------------------------------------------------------------


@pytest.mark.parametrize("method", some(METHODS, "bbb", "mc_dropout"))
def test_measuring_changes_nothing_but_the_history(method, use, tmp_path):
    """The held-out examples are augmented, from all three generators that the training uses."""
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    expected = train(settings(method, validation=20), plain)
    found = train(settings(method, validation=20, validate_every=5), watched)
    assert found.pop("best_step") in (5, 10, 15, 20, 24) and found == expected
    assert particles(watched) == particles(plain)
    rows = history(watched)
    for row in rows:
        row.pop("validation_nll", None), row.pop("validation_accuracy", None)
    assert rows == history(plain)
    states = [read_state(out / "checkpoint.pt") for out in (plain, watched)]
    for name in ("rng", "numpy_rng", "python_rng"):
        first, second = (state[name] for state in states)
        assert torch.equal(first, second) if name == "rng" else first == second


@pytest.mark.parametrize(
    "given, steps",
    [
        ({"validate_every": 5}, [5, 10, 15, 20, 24]),
        ({"validate_every": 100}, [24]),
        ({"patience": 99}, [*range(1, 25)]),
        ({"select": "best", "steps": 40}, [*range(2, 41, 2)]),
        ({"validate_every": 0}, []),
        ({}, []),
    ],
)
def test_the_steps_that_are_measured(given, steps, use, tmp_path):
    train(settings(**{"validation": 20} | given), tmp_path / "run")
    assert [step for step, _ in measured(tmp_path / "run")] == steps


# --- what it chooses -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", some(METHODS, "bbb", "mc_dropout"))
def test_a_run_ends_with_the_particles_of_the_lowest_nll(method, use, tmp_path):
    use(own=True)
    out = tmp_path / "run"
    # Rates at which the last step is not the best one.
    lr = {"ibdr": 0.4, "sgld": 0.4, "mc_dropout": 0.5}.get(method, 0.2)
    chosen = settings(method, select="best", validate_every=2, lr=lr)
    found = train(chosen, out, measure="validation")
    step, nll = min(measured(out), key=lambda pair: pair[1])
    assert found["best_step"] == step < STEPS and found["steps_taken"] == STEPS
    assert found["validation"]["nll"] == nll < measured(out)[-1][1]
    model, its_task, _ = training.load_run(out, report=list)
    with training.predictive(model, chosen):
        again = training.validate(model, its_task)
    assert again["validation"]["nll"] == pytest.approx(nll, rel=1e-6)


def stop(pairs, patience):
    """The step at which a run with these measurements stops, and its best one so far."""
    best, waited = (0, float("inf")), 0
    for step, nll in pairs:
        best, waited = ((step, nll), 0) if nll < best[1] else (best, waited + 1)
        if waited == patience:
            break
    return step, best[0]


@pytest.mark.parametrize(
    "select, patience",
    [
        ("last", 3),
        ("best", 1),
        pytest.param("last", 1, marks=pytest.mark.slow),
        pytest.param("best", 3, marks=pytest.mark.slow),
    ],
)
def test_patience_ends_at_the_right_step(select, patience, use, tmp_path):
    use(own=True)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(settings(validate_every=2, lr=0.2), whole)
    last, best = stop(measured(whole), patience)
    assert best < last < STEPS
    steps = []
    found = train(
        settings(validate_every=2, lr=0.2, select=select, patience=patience),
        stopped,
        on_step=lambda step, *_: steps.append(step),
    )
    assert (found["steps_taken"], found["best_step"]) == (last, best)
    assert steps == [*range(1, last + 1)]
    assert history(stopped) == [row for row in history(whole) if row["step"] <= last]
    ends = dict(measured(whole))[last if select == "last" else best]
    assert found["validation"]["nll"] == ends


@pytest.mark.parametrize(
    "method, lr", [("ibdr", 0.4), pytest.param("bbb", 0.2, marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_anywhere_ends_the_same(method, lr, use, tmp_path, monkeypatch):
    use(own=True)
    chosen = settings(method, select="best", patience=3, validate_every=2, lr=lr)
    whole = train(chosen, tmp_path / "whole")
    last = whole["steps_taken"]
    assert last < STEPS

    def stop_at(moment):
        def on_step(step, *_):
            if step == moment:
                raise KeyboardInterrupt

        return on_step

    for moment in (1, 4, 5, last - 1, last):
        out = tmp_path / f"stopped {moment}"
        with pytest.raises(KeyboardInterrupt):
            train(chosen, out, on_step=stop_at(moment))
        assert train(chosen, out, resume=True) == whole
        assert particles(out) == particles(tmp_path / "whole")
        assert history(out) == history(tmp_path / "whole")

    # When the patience was over, and the measures had not been taken.
    out, steps = tmp_path / "ended", []
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(chosen, out)
    assert train(chosen, out, resume=True, on_step=lambda *s: steps.append(s)) == whole
    assert not steps and particles(out) == particles(tmp_path / "whole")


def test_an_infinite_nll_chooses_nothing(use, tmp_path, monkeypatch):
    """No step is better than another: the run ends with a draw of the last one's posterior."""
    use(own=True)
    impossible = {"nll": float("inf"), "accuracy": 0.0}
    monkeypatch.setattr(validation.metrics, "evaluate", lambda *_: impossible)
    monkeypatch.setattr(training, "_write_results", lambda *_: {})
    for select in ("best", "last"):
        chosen = settings("bbb", select=select, validate_every=2)
        training.train(chosen, tmp_path / select, report=list)
    assert particles(tmp_path / "best") == particles(tmp_path / "last")


def test_particles_that_predict_nan_have_diverged(use, tmp_path):
    use(own=True, predict=lambda model, x: torch.full((3, len(x), 4), float("nan")))
    with pytest.raises(FloatingPointError, match="diverged: they predict NaN"):
        train(settings(validate_every=2), tmp_path / "run")


# --- checkpoints ---------------------------------------------------------------------------------


def ones(parameters):
    return {name: torch.zeros(1) for name in parameters}


DAMAGE = {
    "a list": (lambda best: [], "best has list"),
    "no step": (lambda best: {k: v for k, v in best.items() if k != "step"}, "best has"),
    "text": (lambda best: best | {"step": "2"}, "its best step"),
    "true": (lambda best: best | {"waiting": True}, "its best step"),
    "an unknown NLL": (lambda best: best | {"nll": float("nan")}, "its best step"),
    "beyond": (lambda best: best | {"step": 99}, "its best step"),
    "before": (lambda best: best | {"step": -1}, "its best step"),
    "too patient": (lambda best: best | {"waiting": 99}, "its best step"),
    "no parameters": (lambda best: best | {"parameters": None}, "best.parameters has NoneType"),
    "others": (lambda best: best | {"parameters": {}}, r"best.parameters has \[\]"),
    "other shapes": (
        lambda best: best | {"parameters": ones(best["parameters"])},
        r"best.parameters.* has shape \(1,\)",
    ),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with a checkpoint of step 8 and no more, and its settings."""
    chosen, out = settings(select="best", validate_every=2), tmp_path_factory.mktemp("runs") / "run"

    def on_step(step, *_):
        if step == 9:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "make", lambda *_: task(own=True))
        with pytest.raises(KeyboardInterrupt):
            train(chosen, out, on_step=on_step)
    return chosen, out


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_choice_is_refused(damage, stopped, use, tmp_path):
    use(own=True)
    chosen, folder = stopped
    out = shutil.copytree(folder, tmp_path / "run")
    change, message = DAMAGE[damage]
    state = read_state(out / "checkpoint.pt")
    state["best"] = change(state["best"])
    torch.save(state, out / "checkpoint.pt")
    before = contents(out)
    with pytest.raises(ValueError, match=f"checkpoint.pt.*{message}"):
        train(chosen, out, resume=True)
    assert contents(out) == before


def test_a_checkpoint_of_an_older_version(use, tmp_path):
    """It had no choice, and its history called the objective a loss."""
    whole, old = tmp_path / "whole", tmp_path / "old"
    expected = train(settings("ibdr"), whole)
    train(settings("ibdr"), old)
    state = read_state(old / "checkpoint.pt")
    del state["best"]
    for row in state["history"]:
        row["nll"] = row["loss"]
        row["loss"] = row.pop("objective", row["nll"])
    torch.save(state, old / "checkpoint.pt")
    (old / "metrics.json").unlink()
    assert train(settings("ibdr"), old, resume=True) == expected
    assert history(old) == history(whole) and "objective" in history(old)[0]


# --- the examples --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, text",
    [
        ({"select": "best"}, "select = 'best': the task 'digits' has no validation examples"),
        ({"patience": 2}, "patience = 2: the task 'digits' has no validation"),
        ({"validate_every": 5}, "validate_every = 5: the task"),
        ({"select": "best", "patience": 2}, "select = 'best', patience = 2: the task"),
    ],
)
def test_without_validation_examples(given, text, use, tmp_path):
    with pytest.raises(ValueError, match=text) as raised:
        train(settings(**given), tmp_path / "run")
    assert "--validation N" in str(raised.value)
    assert contents(tmp_path) == {}


def test_a_measure_without_validation_examples(use, tmp_path):
    with pytest.raises(ValueError, match="'digits' has no validation examples to be measured"):
        train(settings(), tmp_path / "run", measure="validation")
    with pytest.raises(ValueError, match="measure must be"):
        train(settings(), tmp_path / "run", measure="train")


def test_a_task_with_validation_examples_holds_out_no_others(use):
    use(own=True)
    with pytest.raises(ValueError, match=r"validation = 20: .*'digits' has validation examples of"):
        training.make_task(settings(validation=20))
    assert len(training.make_task(settings()).train) == 24


def test_settings_that_choose_need_measurements():
    for given in ({"select": "best"}, {"patience": 1}):
        with pytest.raises(ValueError, match="need validate_every > 0"):
            settings(validate_every=0, **given)
        assert settings(steps=100, **given).validation_interval == 5
        assert settings(steps=3, **given).validation_interval == 1
    assert settings(steps=100).validation_interval == 0


def test_no_seed_trains_on_what_another_one_holds_out(use):
    tasks = [training.make_task(settings(validation=20, seed=seed)) for seed in (0, 1, 7)]
    held = [t.validation.indices for t in tasks]
    assert held[0] == held[1] == held[2] and len(set(held[0])) == 20
    assert held[0] != sorted(held[0])
    for t in tasks:
        assert set(t.train.indices) | set(held[0]) == {*range(100)} and len(t.train) == 80


class Untouched(Dataset):
    """Test examples that nobody may read."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        raise AssertionError("a test example was read")


@pytest.mark.parametrize("method", some(["ensemble", "laplace", "tfb", "mc_dropout"], "laplace"))
def test_the_search_reads_no_test_example(method, use, tmp_path):
    use(own=True, test=Untouched(), ood={"far": Untouched()}, shifted={"near": Untouched()})
    out = tmp_path / "run"
    found = train(settings(method, steps=4), out, measure="validation", pictures=True)
    assert found["validation"].keys() == {"accuracy", "nll", "brier", "ece", "num_examples"}
    assert found["validation"]["num_examples"] == 64
    of_the_test_set = {"accuracy", "nll", "brier", "calibrated_nll", "calibrated", "ood", "shifted"}
    assert not found.keys() & of_the_test_set and not list(out.glob("*.png"))
    with pytest.raises(AssertionError, match="a test example was read"):
        train(settings(method, steps=4), tmp_path / "tested")


# --- what is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("combine", some(["prob", "logit"], "logit"))
def test_temperature_and_calibrated_nll_are_those_of_the_metrics(combine, use, tmp_path):
    use(own=True)
    found = train(settings(combine=combine), tmp_path / "run")
    model, its_task, _ = training.load_run(tmp_path / "run", report=list)
    (test, y), (held, z) = (
        (ml.predict(model, data.tensors[0], log=True), data.tensors[1])
        for data in (its_task.test, its_task.validation)
    )
    temperature = ml.metrics.fit_temperature(held, z, combine)
    assert found["temperature"] == pytest.approx(temperature, abs=1e-5) != 1
    assert found["calibrated_nll"] == pytest.approx(
        ml.metrics.calibrated_nll(test, y, combine), rel=1e-5
    )
    scaled = ml.metrics.evaluate(test, y, combine, temperature=temperature)
    assert found["calibrated"].keys() == {
        "nll",
        "brier",
        "entropy",
        "ece",
        "mce",
        "ece_adaptive",
    }
    for name in ("nll", "brier", "entropy"):
        assert found["calibrated"][name] == pytest.approx(scaled[name], rel=1e-4) != found[name]
    own = ml.metrics.evaluate(held, z, combine)
    assert found["validation"]["nll"] == pytest.approx(own["nll"], rel=1e-5)


def test_few_examples_have_no_temperature(use, tmp_path):
    few = {"validation": TensorDataset(*drawn(49, 3)), "test": TensorDataset(*drawn(99, 2))}
    use(**few)
    found = train(settings(steps=2), tmp_path / "few")
    assert "validation" in found
    assert not found.keys() & {"temperature", "calibrated", "calibrated_nll"}
    use(validation=TensorDataset(*drawn(50, 3)), test=TensorDataset(*drawn(100, 2)))
    enough = train(settings(steps=2), tmp_path / "enough")
    assert {"temperature", "calibrated", "calibrated_nll"} <= enough.keys()


def test_the_statistics_have_one_name_for_one_thing(use, tmp_path):
    """The loss is the cross-entropy in every method; the objective stands where it is another."""
    stats = {}

    def on_step(step, steps, last):
        stats.update(last)

    for method, objective in (("ensemble", False), ("ibdr", True), ("bbb", True)):
        stats.clear()
        train(settings(method, steps=2), tmp_path / method, on_step=on_step)
        assert {"loss"} <= stats.keys() and "nll" not in stats
        assert ("objective" in stats) == objective
        assert next(iter(stats)) == "loss" and 0.5 < stats["loss"] < 5


# --- what is shown -------------------------------------------------------------------------------


def test_the_validation_nll_is_drawn_beside_the_loss(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    rows = [
        {"step": 1, "loss": 1.4, "objective": 2.0, "divergence": 0.1},
        {"step": 2, "validation_nll": 1.2, "validation_accuracy": 0.5},
        {"step": 4, "loss": 1.0, "objective": 1.9, "divergence": 0.2, "validation_nll": 1.1},
    ]
    plots.history_diagram(rows, tmp_path / "a.png")
    figure = plt.gcf()
    first, *others = figure.axes
    lines = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    assert lines[0] == [[[1, 1.4], [4, 1.0]], [[2, 1.2], [4, 1.1]]]
    assert lines[1:] == [[[[1, 2.0], [4, 1.9]]], [[[1, 0.1], [4, 0.2]]]]
    assert len(first.get_legend().texts) == 2 and not any(a.get_legend() for a in others)
    plots.history_diagram([{"step": 1, "loss": 1.4}], tmp_path / "b.png")
    assert plt.gcf().axes[0].get_legend() is None
    plots.history_diagram(rows[1:2], tmp_path / "c.png")
    assert plt.gcf().axes[0].lines[0].get_xydata().tolist() == [[2, 1.2]]
    monkeypatch.undo()
    plt.close("all")


def test_the_table_and_the_progress_show_the_new_names(capsys):
    report.print_table([("ensemble", {"nll": 0.5, "calibrated_nll": 0.25})])
    said = capsys.readouterr().out
    assert "calibrated NLL ↓" in said and "0.250" in said and "calibrated NLL: with a temp" in said
    with report.Progress("title") as progress:
        progress.step(1, 2, {"nll_k": 3.0, "sigma": 2.0, "divergence": 1.0, "loss": 0.5})
        (shown,) = [task.fields["stats"] for task in progress.progress.tasks]
    assert shown == "loss 0.5  divergence 1  nll_k 3  sigma 2"


def test_the_command_passes_the_options_on(use, tmp_path, capsys):
    command = "train --method ensemble --particles 2 --rank 2 --steps 6 --batch-size 8".split()
    command += "--validation 20 --validate-every 2 --select best --patience 3".split()
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [kept[name] for name in ("select", "patience", "validate_every", "validation")] == [
        *("best", 3, 2, 20)
    ]
    assert [step for step, _ in measured(tmp_path / "run")][:2] == [2, 4]
    refused(["train", "--seeds", "2", "--out", tmp_path / "other"], capsys, "--seeds is for --comp")
    refused(["train", "--compare", "--shots", "3"], capsys, "compare has no --shots")
    assert not (tmp_path / "other").exists()
