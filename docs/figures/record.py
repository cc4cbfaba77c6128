"""Measure what the figures of the documentation show, on the embedded digits task.

    OMP_NUM_THREADS=1 python docs/figures/record.py methods    four methods, four seeds
    OMP_NUM_THREADS=1 python docs/figures/record.py speed      a step against the particles' number

Each command writes one record into bench/results/digits/. `methods` runs what `multilora train`
runs, with its settings, and looks at the particles between steps. Costs are CPU time of one thread,
so that other programs on the machine disturb them little. docs/figures/draw.py draws the figures.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

import multilora as ml

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # for bench, which is not installed
from bench.record import machine  # noqa: E402
from multilora.app import run as application  # noqa: E402
from multilora.app import steps as training  # noqa: E402
from multilora.app.settings import Settings  # noqa: E402
from multilora.app.tasks import digits  # noqa: E402
from multilora.calibration import equal_width  # noqa: E402

#: What metrics.json has that a record has not, or in a place of its own.
_ELSEWHERE = (*application.MACHINE, "calibrated_nll")
RESULTS = ROOT / "bench" / "results" / "digits"


# --- the four methods ----------------------------------------------------------------------------


def run(method: str, particles: int, seed: int) -> dict:
    """One run of the command: its measures, calibration curve, calibrated NLL and trace."""
    trace: list[list[float]] = []
    cpu: list[float] = []
    started = [0.0]
    made: list[ml.ParticleModel] = []
    make_method, evaluate = training.make_method, application.evaluate
    predictions: list = []

    def remember(settings, model, *more):
        made.append(model)
        return make_method(settings, model, *more)

    def keep(*args, **options):
        result = evaluate(*args, **options)
        predictions.extend(result[1:])
        return result

    task = digits.make(digits.Options(), seed)
    probe = task.test[:256]

    def look(step: int, steps: int, stats: dict[str, float]) -> None:
        cpu.append(1000 * (time.process_time() - started[0]))
        if step % 10 == 0 or step == 1:
            trace.append([step, *_state_of(made[0], *probe)])
        started[0] = time.process_time()

    settings = Settings(method=method, particles=particles, seed=seed)
    with (
        tempfile.TemporaryDirectory() as out,
        mock.patch.object(training, "make_method", remember),
        mock.patch.object(application, "evaluate", keep),
    ):
        result = application.train(settings, Path(out) / "run", on_step=look)
    log_p = ml.metrics.log_mean(predictions[0].log())
    return {
        "method": method,
        "particles": particles,
        "seed": seed,
        "measures": {
            name: value
            for name, value in result.items()
            if name == "corrupted" or (isinstance(value, float) and name not in _ELSEWHERE)
        },
        "step_cpu_ms": statistics.median(cpu[1:]),
        "calibrated_nll": calibrated_nll(log_p, predictions[1]),
        "reliability": reliability(log_p.exp(), predictions[1]),
        "trace": trace,
    }


@torch.no_grad()
def _state_of(model: ml.ParticleModel, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """Mean ‖ΔW_i − ΔW_j‖_F over pairs and layers, mean divergence and mean NLL of the particles."""
    training_mode = model.training
    log_p = ml.predict(model, x, log=True)
    model.train(training_mode)
    nll, divergence = ml.particle_loss(log_p, y)
    K = model.num_particles
    if K == 1:
        return [0.0, 0.0, nll.mean().item()]
    adapters = model.adapters()
    D = ml.pairwise_frobenius(
        [a.lora_A for a in adapters], [a.lora_B for a in adapters], [a.scaling for a in adapters]
    )
    i, j = torch.triu_indices(K, K, 1)
    return [D[:, i, j].sqrt().mean().item(), divergence.item(), nll.mean().item()]


def calibrated_nll(log_p: torch.Tensor, y: torch.Tensor) -> float:
    """NLL with a temperature that is fitted on one half of the examples and used on the other."""
    temperatures = torch.logspace(-1, 1, 201, dtype=torch.float64)
    half = torch.arange(len(y)) % 2 == 0

    def nll(temperature, where):
        scaled = (log_p[where].double() / temperature).log_softmax(-1)
        return -scaled.gather(-1, y[where, None]).mean()

    total = 0.0
    for fitted, used in ((half, ~half), (~half, half)):
        best = min(temperatures, key=lambda t: nll(t, fitted))
        total += nll(best, used).item() * int(used.sum())
    return total / len(y)


def reliability(p: torch.Tensor, y: torch.Tensor) -> list[list[float]]:
    """[mean confidence, accuracy, examples] of each of 15 equal bins that holds an example."""
    confidence, predicted = p.max(-1)
    return torch.stack(equal_width(confidence, predicted == y), 1).tolist()


def methods(seeds: int) -> dict:
    """Four particles, and a single model, for each seed."""
    runs: list[dict] = []
    for seed in range(seeds):
        for method in ("ensemble", "svgd", "ibdr", "single"):
            runs.append(run(method, 1 if method == "single" else 4, seed))
            last = runs[-1]["measures"]
            print(method, seed, last["accuracy"], last["nll"], flush=True)
            write("methods", {"runs": runs})
    return {"runs": runs}


# --- speed against K -----------------------------------------------------------------------------


def speed(rounds: int) -> dict:
    """CPU milliseconds of a step of 16 images for K particles, and of a loop over K PEFT models."""
    import peft

    task = digits.make(digits.Options(), 0)
    x, y = task.train[:16]
    config = {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": task.targets,
        "modules_to_save": [task.head],
    }

    def particles_step(kind, K):
        base = digits.make(digits.Options(), 0).base
        model = ml.get_particle_model(base, peft.LoraConfig(**config), K, head_init="reset").train()
        method = kind(model)
        optimizer = torch.optim.AdamW(model.particle_parameters(), lr=3e-3)

        def step():
            method.backward(lambda: (model(x), y))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def loop_step(K):
        models = [
            peft.get_peft_model(digits.make(digits.Options(), 0).base, peft.LoraConfig(**config))
            for _ in range(K)
        ]
        parameters = [[p for p in m.parameters() if p.requires_grad] for m in models]
        optimizers = [torch.optim.AdamW(p, lr=3e-3) for p in parameters]

        def step():
            for model, optimizer in zip(models, optimizers):
                torch.nn.functional.cross_entropy(model.train()(x), y).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step

    points = []
    for K in (1, 2, 4, 8):
        steps = {
            "ensemble": particles_step(ml.Ensemble, K),
            "svgd": particles_step(ml.SVGD, K),
            "ibdr": particles_step(ml.IBDR, K),
            "loop over PEFT models": loop_step(K),
        }
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(rounds + 3):
            for name, step in steps.items():
                start = time.process_time()
                step()
                if round_ >= 3:  # the first ones warm up
                    samples[name].append(1000 * (time.process_time() - start))
        quartiles = {name: statistics.quantiles(s, n=4) for name, s in samples.items()}
        points.append({"particles": K, "step_cpu_ms": quartiles})
        print(K, {name: round(q[1], 1) for name, q in quartiles.items()}, flush=True)
    return {"rounds": rounds, "images": 16, "points": points}


# --- records -------------------------------------------------------------------------------------


def _rounded(value):
    """Five significant digits are more than any of these numbers has."""
    if isinstance(value, float):
        return None if value != value else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def write(name: str, record: dict) -> None:
    """One line for each run, so that the record stays short."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = f"python docs/figures/record.py {name}"
    about = {"command": command} | machine(torch.device("cpu"))
    [key] = [key for key, value in record.items() if isinstance(value, list)]
    head = {k: v for k, v in record.items() if k != key}
    lines = ",\n  ".join(json.dumps(_rounded(entry)) for entry in record[key])
    text = json.dumps({"machine": about, **head}, indent=1)[:-2]
    (RESULTS / f"{name}.json").write_text(f'{text},\n "{key}": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("methods", "speed"))
    parser.add_argument("--seeds", type=int, default=4, help="of the methods [4]")
    parser.add_argument("--rounds", type=int, default=9, help="steps that are timed [9]")
    args = parser.parse_args()
    write(args.what, methods(args.seeds) if args.what == "methods" else speed(args.rounds))
