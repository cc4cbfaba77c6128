"""The plan of a comparison: the rows, the configurations, the seeds and the folders."""

import json

import pytest

from multilora.app.compare.plan import Run, at_edge, keep, make_plan, plan_of, read
from multilora.app.compare.suite import TaskEntry, known_rows, recipe, rows, tasks

TOY = TaskEntry("toy", "toy", {"task": "digits", "shots": 5, "steps": 20})
EVERY = [name for name, row in known_rows().items() if not row.of]


def plan(names=("single", "ensemble", "svgd", "ibdr"), trials=6, task=TOY, **given):
    arguments = {"tune_seeds": 2, "seeds": 3, "space": recipe()["space"]} | given
    return make_plan(
        "quick", {task.name: task}, rows(names, "ensemble"), "ensemble", trials=trials, **arguments
    )


def test_the_same_arguments_give_the_same_plan_and_the_hash_sees_every_change():
    assert plan().flat() == plan().flat()
    others = [plan(trials=7), plan(seeds=4), plan(names=["single"]), plan(tune_seeds=3)]
    others.append(plan(task=TaskEntry("toy", "toy", {"task": "digits", "shots": 6, "steps": 20})))
    assert len({p.flat()["hash"] for p in [plan(), *others]}) == 6


def test_tuning_and_final_seeds_share_none():
    p = plan(tune_seeds=50, seeds=200)
    assert not set(p.tune_seeds) & set(p.seeds)
    assert (len(set(p.tune_seeds)), len(set(p.seeds))) == (50, 200)


def test_every_trial_has_the_same_lr_and_decay_for_all_rows_that_share_them():
    p = plan(EVERY, trials=16)
    shared = [row for row in p.tuned if p.shares_lr(row)]
    # SGLD and full copies need learning rates of other sizes.
    assert {row.name for row in p.tuned} - {row.name for row in shared} == {
        "sgld",
        "single_full",
        "ensemble_full",
        "svgd_full",
    }
    for trial in range(16):
        pairs = {
            (s.lr, s.weight_decay)
            for row in shared
            for s in [p.settings(Run("toy", row.name, "tune", trial, p.tune_seeds[0]))]
        }
        assert len(pairs) == 1
    rates = [c["lr"] for c in p.trials["toy"]["ensemble"][1:]]
    assert len(set(rates)) == 15
    assert 1e-3 <= min(rates) < 3e-3 and 1e-2 < max(rates) <= 3e-2


def test_numbers_of_a_row_are_its_own_and_in_their_range():
    p = plan(["ibdr", "sam", "svgd"], trials=40)
    ibdr, sam = p.trials["toy"]["ibdr"][1:], p.trials["toy"]["sam"][1:]
    assert all(1e-3 <= c["alpha"] <= 1 and 3e-3 <= c["rho"] <= 0.3 for c in ibdr)
    assert [c["rho"] for c in ibdr] != [c["rho"] for c in sam]
    assert {c["scope"] for c in p.trials["toy"]["svgd"][1:]} == {"layer", "global"}
    assert len({c["alpha"] / c["rho"] for c in ibdr}) > 30  # the numbers are not tied together


def test_trial_0_is_the_documented_default():
    p = plan(EVERY, trials=2)
    from multilora.app.settings import recommended

    for row in p.tuned:
        own = recommended("digits", row.method, shots=5, steps=20, seed=100, **row.settings)
        assert p.settings(Run("toy", row.name, "final", 0, 100)) == own


def test_all_rows_have_the_same_number_of_tuning_runs():
    p = plan(EVERY, trials=5, tune_seeds=3)
    runs = p.tuning_runs("toy")
    assert len(set(runs)) == len(runs) == 15 * len(p.tuned)
    assert {r.row: sum(q.row == r.row for q in runs) for r in runs} == dict.fromkeys(EVERY, 15)


def test_final_runs_are_the_chosen_the_defaults_and_the_controls_each_once():
    p = plan(["single", "svgd", "ibdr", "single_long", "single_scaled"])
    chosen = {"single": 4, "ensemble": 0, "svgd": 2, "ibdr": 4}
    runs = p.final_runs("toy", chosen)
    assert len(runs) == len(set(runs))
    pairs = {(r.row, r.trial) for r in runs}
    assert pairs == {
        *(("single", 4), ("single", 0), ("single_long", 4), ("ensemble", 0)),
        *(("svgd", 2), ("svgd", 0), ("ibdr", 4), ("ibdr", 0)),
        *(("ensemble", 4), ("ensemble", 2)),  # controls
    }
    assert {r.seed for r in runs} == set(p.seeds)
    control = p.settings(Run("toy", "ensemble", "final", 2, 100))
    tuned = p.settings(Run("toy", "svgd", "final", 2, 100))
    assert (control.lr, control.weight_decay) == (tuned.lr, tuned.weight_decay)
    assert control.method == "ensemble"


def test_a_variant_has_the_configuration_of_its_row():
    p = plan(["ibdr_no_volume", "single_long", "ensemble_8", "laplace"])
    run = Run("toy", "ibdr_no_volume", "final", 3, 100)
    variant, ibdr = p.settings(run), p.settings(Run("toy", "ibdr", "final", 3, 100))
    assert dict(variant.method_args) == dict(ibdr.method_args) | {"alpha": 0.0}
    assert variant.lr == ibdr.lr
    long = p.settings(Run("toy", "single_long", "final", 3, 100))
    assert (long.steps, long.particles) == (160, 1)
    assert p.settings(Run("toy", "ensemble_8", "final", 3, 100)).particles == 8
    laplace = p.settings(Run("toy", "laplace", "final", 3, 100))
    assert (laplace.method, laplace.particles, laplace.lr) == ("laplace", 4, ibdr.lr)


def test_tuning_runs_of_a_task_with_a_development_set_do_not_see_its_test_set(tmp_path):
    folder = tmp_path / "cifar"
    folder.mkdir()
    (entry,) = tasks(["vtab"], str(tmp_path), {"steps": 7}).values()
    p = plan(["single"], task=entry)
    tune = p.settings(Run("vtab/cifar", "single", "tune", 0, 1))
    final = p.settings(Run("vtab/cifar", "single", "final", 0, 1))
    assert (tune.options.split, final.options.split) == ("tune", "test")
    assert entry.measure == "test" and final.steps == 7
    assert Run("vtab/cifar", "single", "tune", 0, 1).folder(tmp_path).parts[-3] == "vtab_cifar"


def test_the_edge_is_the_smallest_and_the_largest_learning_rate_tried():
    p = plan(trials=8)
    rates = [0.003] + [c["lr"] for c in p.trials["toy"]["ibdr"][1:]]
    at = [at_edge(p, "toy", "ibdr", t) for t in range(8)]
    assert at == [r in (min(rates), max(rates)) for r in rates] and sum(at) == 2
    assert not at_edge(plan(trials=1), "toy", "ibdr", 0)


def test_a_folder_keeps_its_plan(tmp_path):
    keep(plan(), tmp_path / "c", "command")
    keep(plan(), tmp_path / "c", "another command")
    assert plan_of(read(tmp_path / "c")).flat() == plan().flat()
    assert read(tmp_path / "c")["command"] == "command"
    with pytest.raises(ValueError, match="another comparison, with other trials"):
        keep(plan(trials=3), tmp_path / "c", "")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"photos holds files but no comparison"):
        keep(plan(), tmp_path / "photos", "")
    with pytest.raises(FileNotFoundError, match="holds no comparison"):
        read(tmp_path / "photos")
    file = tmp_path / "c" / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": 3}))
    with pytest.raises(ValueError, match=r"plan.json is damaged"):
        read(tmp_path / "c")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rows(["sgdv"], "ensemble"), "the rows are single, .*; got sgdv"),
        (lambda: rows(["single"], "ibdr"), "no numbers of its own, as single or ensemble; got"),
        (lambda: rows(["single"], "single_long"), "no numbers of its own"),
        (
            lambda: tasks(["imagenet"], None, {}),
            "the tasks of a comparison are digits5, .*imagenet",
        ),
        (lambda: tasks(["vtab"], None, {}), "the task 'vtab' needs --data"),
        (lambda: tasks(["sentiment"], None, {}), "the task 'sentiment' needs --data"),
        (lambda: plan(trials=0), "--trials"),
        (lambda: plan(seeds=0), "--seeds"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
