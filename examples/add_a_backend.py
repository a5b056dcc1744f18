"""Register a backend of your own, here one that counts engine calls: python examples/add_a_backend.py engines

A full one has the methods of `Backend` in runtime/backends/base.py; runtime/backends/fake.py is the shortest.
"""

import sys
from collections import Counter

from flowturbo import Pipeline
from runtime.backends import BACKENDS, BackendEntry
from runtime.backends.onnxruntime import OnnxRuntimeBackend

CALLS = Counter()


class CountedEngine:
    """An engine that counts its calls."""

    def __init__(self, engine, graph):
        self.engine, self.graph, self.close = engine, graph, engine.close

    def run(self, inputs, outputs):
        CALLS[self.graph] += 1
        self.engine.run(inputs, outputs)


class CountingBackend(OnnxRuntimeBackend):
    """ONNX Runtime whose engines count their calls."""

    def load(self, file):
        return CountedEngine(super().load(file), file.graph)


# Module, class, the targets whose engines it runs, and what speaks against it on this machine ("": nothing).
BACKENDS["counting"] = BackendEntry("__main__", "CountingBackend", ("cpu",), lambda target: "")
with Pipeline.load(sys.argv[1], backend="counting") as pipeline:
    pipeline.generate(next(iter(pipeline.manifest.model.classes)), sampler="H1P2")
print(dict(CALLS))
