"""Many fine-tunings in one process: K runs of a sweep over one frozen base."""

from multilora.many.arguments import RunArguments
from multilora.many.fit import fit_many
from multilora.many.runs import Run
from multilora.many.table import Results, Row

__all__ = ["Results", "Row", "Run", "RunArguments", "fit_many"]
