"""docs/models.md: every model, and what the isolation check cannot see."""

from zoo.every_model import ZOO

#: What one check cannot see, and why.
CANNOT_SEE = {
    "other inputs": "Rows that meet only for inputs unlike those of the first forward of a form: "
    "a branch that was not taken then, or groups of rows that another batch size cuts.",
    "equal particles": "Rows that meet only where they are equal, as all particles' are before the "
    "first step: the check moves the adapters apart to see anything then.",
    "less than rounding": "Rows that change each other by less than the rounding of the model's "
    "dtype, which the tolerance must let pass.",
    "half precision": "In bfloat16 and float16 a difference below 10 % in most rows counts as "
    "rounding, unless a particle's rows also change when only the others' adapters do.",
    "gradients": "Outputs are compared, not gradients: a term whose value is zero and whose "
    "gradient is not (`m - m.detach()`).",
}

_HEAD = """# Models

Every architecture below runs in the tests with tiny random weights, in evaluation and in training
mode. For each particle all tensors of the output, and the gradients of all adapters and heads, are
those of PEFT with that particle's adapter: to 1e-10 in float64, or to 1e-5 where the model itself
computes norms, rotary angles or softmax in float32. "batch" means that `fold="batch"`, the default,
is right; "loop" that it is refused, and `fold="loop"` is right. Batch norms keep the base's
statistics.

This file is written by `PYTHONPATH=tests/support python -m zoo`.

| model | adapted | fold | |
|---|---|---|---|
"""


def table() -> str:
    """docs/models.md."""
    rows = []
    for name, entry in ZOO.items():
        targets = entry.lora.get("target_modules", "PEFT's default")
        names = targets if isinstance(targets, str) else ", ".join(targets)
        notes = [entry.why] if entry.why else []
        notes += [f"`{key}={value!r}`" for key, value in entry.axes.items()]
        rows.append(
            f"| {name} | {names.replace('|', chr(92) + '|')} | {entry.fold} | {' '.join(notes)} |"
        )
    limits = "".join(f"- {text}\n" for text in CANNOT_SEE.values())
    return f"{_HEAD}{chr(10).join(rows)}\n\n## What the isolation check cannot see\n\n{limits}"
