"""The command line, for its tests: what a run measured, and what is refused."""

import json

from multilora.app import cli
from multilora.app.run import MACHINE


def numbers(out):
    """What a run measured, without what depends on the machine."""
    return on_any_machine(json.loads((out / "metrics.json").read_text()))


def on_any_machine(metrics):
    return {name: value for name, value in metrics.items() if name not in MACHINE}


def refused(arguments, capsys, *texts):
    """The command ends with exit code 1 and one line, which has the texts."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("multilora:")]
    assert len(said) == 1, said
    for text in texts:
        assert text in said[0]
