"""Every error that a user can cause. One root, so that a command prints one line and exits 1.

A message says what was given, what is allowed and what to do; the three are separate arguments so that none is
forgotten and tests can ask for each.
"""

from __future__ import annotations


class FlowTurboError(Exception):
    """Root of the errors that are not our bugs.

    Attributes:
        given: what was read or asked for.
        allowed: what is accepted, if that can be said.
        remedy: what to do now, if that can be said.
    """

    def __init__(self, given: str, *, allowed: str = "", remedy: str = "") -> None:
        self.given, self.allowed, self.remedy = given, allowed, remedy
        parts = [given, f"Allowed: {allowed}" if allowed else "", f"Do: {remedy}" if remedy else ""]
        super().__init__("\n  ".join(part for part in parts if part))


class RequestError(FlowTurboError, ValueError):
    """A class, schedule, number or file of the request is not possible."""


class EngineError(FlowTurboError):
    """An engine directory or one of its files cannot be used."""


class BackendError(FlowTurboError):
    """A backend or provider is missing, or did not run what it was asked to run."""


class OutputError(FlowTurboError):
    """A result could not be written."""


class NonFiniteError(FlowTurboError, ArithmeticError):
    """A network or the decoder produced NaN or infinity."""


class CheckpointError(FlowTurboError):
    """A checkpoint cannot be read, or is not what it was named as."""


class ProofError(FlowTurboError):
    """An exported graph or engine does not compute what the PyTorch model computes."""


class DataError(FlowTurboError):
    """A data set or a latent cache cannot be used."""


class TrainingError(FlowTurboError):
    """Training cannot start or go on."""
