"""A progress object that keeps what it was told, for tests."""

from __future__ import annotations

from runtime.system.progress import Progress


class RecordedProgress(Progress):
    """Keep stages and written lines in `lines`, and updates in `updates`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.updates: list[tuple[str, int, int]] = []

    def stage(self, text: str) -> None:
        self.lines.append(text)

    def write(self, text: str) -> None:
        self.lines.append(text)

    def update(self, task: str, done: int, total: int) -> None:
        self.updates.append((task, done, total))
