"""Pictures, an extractor and numbers that were computed independently, for the tests of metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from flowturbo.evaluation.quality.features import METADATA_KEY

KNOWN = np.load(Path(__file__).parent / "data" / "metrics.npz", allow_pickle=False)
SAMPLES, REFERENCE, PROBS = KNOWN["samples"], KNOWN["reference"], KNOWN["probs"]
SIDE = 16


def write_mean_colour(path: Path, *, batch: int | str = "B", side: int | str = "S", about: str | None = None) -> Path:
    """An ONNX file that gives the mean of each colour, as someone else might bring it."""
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["pooled"])]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [batch, 3, 1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if about is not None:
        model.metadata_props.add(key=METADATA_KEY, value=about)
    onnx.save(model, str(path))
    return path


def pictures(count: int, seed: int = 0) -> np.ndarray:
    g = np.random.Generator(np.random.Philox(seed))
    colour = g.integers(0, 256, (count, 1, 1, 3))
    return np.clip(colour + g.integers(-20, 20, (count, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
