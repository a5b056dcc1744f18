"""How long work reports its progress. The base class is silent; the commands show one on stderr."""

from __future__ import annotations


class Progress:
    """Receive what a long job does.

    A job names the stage it is in, counts what it repeats, and writes the results that a reader wants to keep.
    """

    def stage(self, text: str) -> None:
        """Say what is being done now; the next stage replaces it."""

    def update(self, task: str, done: int, total: int) -> None:
        """Say how much of a repeated task is done, of how much."""

    def write(self, text: str) -> None:
        """Write a line that stays."""


SILENT = Progress()
