"""The tables of the papers, from evidence that is made up."""

import pytest

from evidence import make_evidence
from multilora.app import recipes
from multilora.app.compare.analysis import Analysis
from multilora.app.compare.papers import of_papers
from multilora.app.compare.report import write
from multilora.app.compare.suite import known_rows, recipe, tasks

VTAB = [f"vtab/{name}" for name in recipes.read("vtab1k")["datasets"]]


def finals(names):
    """Accuracies .50 and .52 of the ensemble and .60 and .62 of IBDR, ECEs a tenth of them."""

    def runs(accuracy):
        keys = ("nll", "calibrated_nll", "auroc_ood")
        values = [accuracy, accuracy + 0.02]
        return {key: [1.0, 1.1] for key in keys} | {
            "accuracy": values,
            "ece": [v / 10 for v in values],
        }

    return {name: {"ensemble": runs(0.5), "ibdr": runs(0.6)} for name in names}


def cells(text, label):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_whole_table_has_its_average():
    accuracy, ece = of_papers(Analysis(make_evidence(finals(VTAB))))
    assert accuracy.startswith("IBDR, Table 1: top-1 accuracy (%) on VTAB-1K")
    headings = cells(accuracy, " ")
    assert headings[0] == "CIFAR100" and headings[-2:] == ["sNORB-Ele", "AVG"]
    assert cells(accuracy, "DeepEns") == ["51.0"] * 20
    assert cells(accuracy, "IBDR") == ["61.0"] * 20
    assert cells(accuracy, "BayesTune") == cells(accuracy, "FFT") == [""] * 20
    assert ece.startswith("IBDR, Table 2") and cells(ece, "IBDR") == ["0.06"] * 20


def test_what_was_not_measured_is_empty():
    names = ["obqa", "boolq"]
    accuracy, ece = of_papers(Analysis(make_evidence(finals(names))))
    assert cells(accuracy, "ENS") == ["", "", "", "", "51.00", "51.00", ""]
    assert cells(ece, "IBDR") == ["", "", "", "", "6.10", "6.10", ""]
    assert of_papers(Analysis(make_evidence(finals(["digits5"])))) == []


def test_the_report_has_them(tmp_path):
    write(make_evidence(finals(["obqa"])), tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "## Tables of the papers\n\nIBDR, Table 3: accuracy (%)" in text
    write(make_evidence(finals(["digits5"])), tmp_path)
    assert "Tables of the papers" not in (tmp_path / "compare.md").read_text()


def test_the_suite_has_the_rows_of_the_tables():
    suite = recipe()["suites"]["paper"]
    for rows in recipes.read("papers")["rows"].values():
        assert {row for row in rows.values() if row} <= {*suite["rows"]} <= {*known_rows()}
    with pytest.raises(ValueError, match="needs --data"):
        tasks(suite["tasks"], None, {})
