"""Writes docs/models.md."""

from pathlib import Path

from zoo.document import table

(Path(__file__).parents[3] / "docs" / "models.md").write_text(table())
