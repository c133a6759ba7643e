"""What is said where a stage is gone. Light, so that whoever answers clients may know it without the pipeline."""

from __future__ import annotations


class StageLost(Exception):
    """A stage ended, did not answer in time, or said what makes no sense; ``number`` is its place, from 0."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


class PipelineDown(RuntimeError):
    """A stage is gone and could not be replaced."""
