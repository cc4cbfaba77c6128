"""The command line, for its tests: what a run measured, and what is refused."""

import json

from multilora.app import cli


def numbers(out):
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["step_ms"]  # the one number that a clock decides
    return metrics


def refused(arguments, capsys, *texts):
    """The command ends with exit code 1 and one line, which has the texts."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("multilora:")]
    assert len(said) == 1, said
    for text in texts:
        assert text in said[0]
