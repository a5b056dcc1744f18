"""A device in pure NumPy whose networks are a closed formula: for tests, docs and trying a sampler without engines.

The data of label y are N(μ_y, s²) in every latent element, so the velocity of the linear path is known exactly, and a
perfect sampler ends at μ_y + s·noise. The refiner predicts exactly the change of velocity it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.backends.base import BackendOptions, Buffer, EngineFile, HostBuffer, RuntimeInfo, allocate_host
from runtime.system.errors import EngineError

Floats = NDArray[np.float32]
DATA_STD = 0.5


def compute_label_mean(label: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return μ_y: labels spread over [−1, 1]."""
    return np.sin(label).astype(np.float32)


def compute_velocity(x: Floats, t: Floats, label: Floats) -> Floats:
    """Return the velocity of the linear path from N(0, 1) to N(μ, s²): x [N, C, H, W], t and label [N]."""
    t, mu = (value.reshape(-1, 1, 1, 1) for value in (t, compute_label_mean(label)))
    gain = (t * DATA_STD**2 - (1 - t)) / ((1 - t) ** 2 + (t * DATA_STD) ** 2)
    result: Floats = (mu + gain * (x - t * mu)).astype(np.float32)
    return result


class FakeBackend:
    """The shipped fake device."""

    def __init__(self, options: BackendOptions) -> None:
        self.ran = RuntimeInfo("fake", "NumPy formula, not the engines", "cpu", {"numpy": np.__version__})

    def load(self, file: EngineFile) -> FakeEngine:
        return FakeEngine(file)

    def allocate(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        return allocate_host(shape, dtype)

    def close(self) -> None:
        pass


class FakeEngine:
    """The contract of a graph, computed by the formula."""

    def __init__(self, file: EngineFile) -> None:
        self._file = file
        self._closed = False

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        if self._closed:
            raise EngineError(f"{self._file.graph} was closed", remedy="load the pipeline again")
        arrays = {name: _get_array(buffer) for name, buffer in inputs.items()}
        results = self._compute(arrays, {name: _get_array(buffer) for name, buffer in outputs.items()})
        for name, buffer in outputs.items():
            _get_array(buffer)[...] = results[name]

    def _compute(self, inputs: dict[str, Floats], outputs: dict[str, Floats]) -> dict[str, Floats]:
        if self._file.graph.endswith("conditioning"):
            mods = np.zeros_like(outputs["mods"])
            mods[:, 0], mods[:, 1] = inputs["t"], inputs["y"]
            return {"mods": mods}
        if self._file.graph.startswith("head"):
            features = np.zeros_like(outputs["features"])
            features[:, : inputs["latents"].shape[1]] = inputs["latents"]
            return {"features": features}
        if self._file.graph.startswith(("decoder", "tile")):
            latents = inputs["latents" if "latents" in inputs else "features"]
            factor = outputs["images"].shape[2] // latents.shape[2]
            images = np.repeat(np.repeat(latents[:, :3], factor, axis=2), factor, axis=3) / 4 + 0.5
            finite = np.asarray(np.isfinite(latents).all(axis=(1, 2, 3)), np.float32)
            return {"images": images.clip(0, 1), "finite": finite, "sums": np.zeros_like(inputs.get("moments", finite))}
        return evaluate_trunk(inputs, self._file.graph == "refiner")

    def close(self) -> None:
        self._closed = True


def evaluate_trunk(inputs: dict[str, Floats], refiner: bool) -> dict[str, Floats]:
    """Evaluate the predictor's or refiner's contract in NumPy; also the reference of exported graphs."""
    base, slopes = inputs["base"], inputs["slopes"]
    a, b, e = (inputs[name] for name in ("point_coef", "update_coef", "error_coef"))
    points = _scale(a[0], base) + np.einsum("kb,kbchw->bchw", a[1:], slopes)
    x = points[inputs["row_image"]]
    output = compute_velocity(x, inputs["mods"][:, 0], inputs["mods"][:, 1]) - (inputs["velocity"] if refiner else 0)
    rows = np.einsum("cnm,mchw->nchw", inputs["mix"], output) + (inputs["residual"] if refiner else 0)
    slope = rows[: len(base)]
    x_next = _scale(b[0], base) + np.einsum("kb,kbchw->bchw", b[1:-1], slopes) + _scale(b[-1], slope)
    error = np.einsum("kb,kbchw->bchw", e[:-1], slopes) + _scale(e[-1], slope)
    magnitude = np.maximum(np.abs(base), np.abs(x_next))
    tolerance = inputs["atol"].reshape(-1, 1, 1, 1) + inputs["rtol"].reshape(-1, 1, 1, 1) * magnitude
    return {
        "slope": slope,
        "velocities": rows,
        "x_next": x_next,
        "err": _rms(error / tolerance),
        "slope_rms": _rms(slope),
    }


def _scale(coefficient: Floats, tensor: Floats) -> Floats:
    return coefficient.reshape(-1, 1, 1, 1) * tensor


def _rms(tensor: Floats) -> Floats:
    out: Floats = np.sqrt(np.mean(np.square(tensor), axis=(1, 2, 3)))
    return out


def _get_array(buffer: Buffer) -> Floats:
    assert isinstance(buffer, HostBuffer), "a buffer of another backend"
    return buffer.array
