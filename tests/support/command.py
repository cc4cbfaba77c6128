"""The command line, for the tests of what it refuses."""

from multilora.app import cli


def refused(arguments, capsys, *texts):
    """The command ends with exit code 1 and one line, which has the texts."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("multilora:")]
    assert len(said) == 1, said
    for text in texts:
        assert text in said[0]
