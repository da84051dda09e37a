"""Loads in the background that one step began: they are told of together, so that what began in one step goes on in
one. Each has been handed to the thread that does it, so none waits for anything that is still to come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class LoadsOfStep:
    """`missing`: requests whose loads are not over yet."""

    missing: set[str]
    lost: set[str] = field(default_factory=set)
    over: set[str] = field(default_factory=set)


class StepLoads:
    """By request. Not for several threads at once."""

    def __init__(self) -> None:
        self._steps: dict[str, LoadsOfStep] = {}

    def begin(self, requests: Iterable[str]) -> None:
        """One step's."""
        step = LoadsOfStep(set(requests))
        self._steps.update(dict.fromkeys(step.missing, step))

    def end(self, request: str, *, lost: bool = False) -> tuple[set[str], set[str]]:
        """A request's load is over: the requests that may be told of now, and those of them whose load has failed. One
        that no step began is told of by itself."""
        step = self._steps.pop(request, None) or LoadsOfStep({request})
        step.missing.discard(request)
        step.over.add(request)
        if lost:
            step.lost.add(request)
        return (set(), set()) if step.missing else (step.over, step.lost)
