"""Evidence of comparisons that never ran, made from arrays."""

import numpy as np

#: The arrays' names are those of metrics.json.
KEYS = ("nll", "calibrated_nll", "auroc_ood")


def runs(values, seeds=None):
    """seed -> measures; values: a number per seed for all of KEYS, or a dict of such."""
    if not isinstance(values, dict):
        values = dict.fromkeys(KEYS, values)
    count = len(next(iter(values.values())))
    seeds = range(100, 100 + count) if seeds is None else seeds
    return {str(s): {k: float(v[i]) for k, v in values.items()} for i, s in enumerate(seeds)}


def row(label=None, table="tuned", **entry):
    return {"label": label, "table": table, "steps": 1, **entry}


def make_evidence(
    finals, *, rows=None, controls=None, defaults=None, ratios=None, edges=(), reference="ensemble"
):
    """A compare.json's content.

    Args:
        finals: task -> row -> values as in `runs`, or the runs themselves. The first task must have
            all rows, and the first row all seeds.
        rows: row -> the plan's entry, where it is more than a label.
        controls, defaults: as finals; where they are not given, the finals of the reference are
            every row's controls, and each row's finals its defaults.
        ratios: row -> the ratio of its step; 1 to each elsewhere.
        edges: pairs (task, row) whose learning rate is at the edge.
    """

    def made(part):
        return {
            task: {r: v if _is_runs(v) else runs(v) for r, v in own.items()}
            for task, own in part.items()
        }

    finals = made(finals)
    names = dict.fromkeys(name for own in finals.values() for name in own)
    entries = {n: row(n) | (rows or {}).get(n, {}) for n in names}
    if controls is None:
        controls = {t: {r: own.get(reference, {}) for r in own} for t, own in finals.items()}
    seeds = sorted({int(s) for own in finals.values() for r in own.values() for s in r})
    tuned = [n for n in names if not entries[n].get("of")]
    return {
        "plan": {
            "suite": "quick",
            "hash": "0123456789abcdef",
            "trials": 3,
            "tune_seeds": [1, 2],
            "seeds": seeds,
            "reference": reference,
            "rows": entries,
            "tasks": {task: {"label": task} for task in finals},
        },
        "finals": finals,
        "defaults": finals if defaults is None else made(defaults),
        "controls": made(controls),
        "trials": {
            task: {
                r: [{"settings": {"lr": 0.01}, "nll": [0.2, 0.4], "seconds": 1.0}] * 3
                for r in tuned
            }
            for task in finals
        },
        "chosen": {
            task: {
                r: {"trial": 1, "settings": {"lr": 0.01}, "edge": (task, r) in edges} for r in tuned
            }
            for task in finals
        },
        "costs": {
            task: {
                r: {
                    "step_ms": 2.0,
                    "ratio": (ratios or {}).get(r, 1.0),
                    "memory_mb": 100.0,
                    "trainable": 1000,
                    "forward_rows": 4,
                    "seconds_tuning": 6.0,
                }
                for r in names
            }
            for task in finals
        },
        "missing": [],
        "environment": {"torch": "2.11"},
        "command": "multilora compare --out DIR",
    }


def _is_runs(value):
    return isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())


def realistic(tasks=5, seeds=20, seed=0):
    """Evidence that looks like the standard suite's: rows of several kinds, five tasks."""
    r = np.random.default_rng(seed)
    # row: (mean gain of NLL, ratio, its entry)
    known = {
        "single": (-0.06, 1.0, row("single")),
        "single_scaled": (-0.04, 1.0, row("single, temperature", "derived", of="single")),
        "single_long": (-0.05, 1.0, row("single, 8 × steps", "compute", of="single", steps=8)),
        "mc_dropout": (-0.055, 1.05, row("MC dropout")),
        "laplace": (-0.05, 1.0, row("Laplace", "derived", of="single")),
        "tfb": (-0.07, 1.0, row("TFB")),
        "ensemble": (0.0, 1.7, row("ensemble")),
        "ensemble_soup": (-0.045, 1.7, row("ensemble, uniform soup", "derived", of="ensemble")),
        "ensemble_greedy": (-0.04, 1.7, row("ensemble, greedy soup", "derived", of="ensemble")),
        "ensemble_8": (0.012, 3.1, row("ensemble, K = 8", "compute", of="ensemble")),
        "ensemble_long": (
            0.004,
            1.7,
            row("ensemble, 2 × steps", "compute", of="ensemble", steps=2),
        ),
        "map": (0.0, 1.75, row("MAP")),
        "sgld": (-0.25, 1.8, row("SGLD", space={"lr": {"log": [0.03, 3]}})),
        "bbb": (-0.02, 1.9, row("BBB")),
        "blob": (-0.01, 2.0, row("BLoB")),
        "sa_bnn": (-0.015, 3.3, row("SA-BNN")),
        "sam": (0.024, 3.2, row("SAM")),
        "svgd": (-0.002, 1.9, row("SVGD")),
        "svgd_long": (0.001, 1.9, row("SVGD, 2 × steps", "compute", of="svgd", steps=2)),
        "mutual": (0.002, 2.1, row("mutual learning")),
        "ibdr": (0.018, 3.9, row("IBDR")),
        "ibdr_no_volume": (0.017, 3.8, row("IBDR without volume", "derived", of="ibdr")),
        "ibdr_no_noise": (0.016, 3.85, row("IBDR without noise", "derived", of="ibdr")),
        "ibdr_no_ascent": (0.001, 2.0, row("IBDR without ascent", "derived", of="ibdr")),
        "ibdr_soup": (-0.04, 3.9, row("IBDR, uniform soup", "derived", of="ibdr")),
        "ibdr_greedy": (-0.03, 3.9, row("IBDR, greedy soup", "derived", of="ibdr")),
    }
    finals, controls = {}, {}
    for task in [f"task {i}" for i in range(tasks)]:
        base = 0.3 + 0.05 * r.standard_normal(seeds)
        finals[task] = {}
        for name, (gain, _, _) in known.items():
            noise = 0.0 if name == "ensemble" else 0.015 * r.standard_normal(seeds)
            finals[task][name] = {
                "nll": base - gain + noise,
                "calibrated_nll": base - 0.02 - 0.8 * gain + noise,
                "auroc_ood": 0.85 + 0.3 * gain + 0.02 * r.standard_normal(seeds),
                "accuracy": 0.9 + 0.005 * r.standard_normal(seeds),
                "mutual_information": 0.05 + abs(gain) + 0.002 * r.standard_normal(seeds),
            }
        # IBDR's learning rate is better for the ensemble too, by .016.
        reference = finals[task]["ensemble"]
        higher = reference | {k: reference[k] - 0.016 for k in ("nll", "calibrated_nll")}
        controls[task] = {n: higher if n == "ibdr" else reference for n in known}
    return make_evidence(
        finals,
        rows={n: entry for n, (_, _, entry) in known.items()},
        controls=controls,
        ratios={n: ratio for n, (_, ratio, _) in known.items()},
        edges=[("task 1", "blob")],
    )
