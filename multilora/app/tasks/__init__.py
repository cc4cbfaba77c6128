"""What the command line trains on: digits that need no download, images, questions."""

from __future__ import annotations

from multilora.app.tasks import commonsense


def names() -> tuple[str, ...]:
    return ("digits", "images", "vtab", *commonsense.names())
