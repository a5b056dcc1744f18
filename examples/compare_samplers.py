"""Compare samplers by their same-seed error: python examples/compare_samplers.py engines

The error is the distance of the latents from those of a very fine sampler that starts from the same noise.
"""

import dataclasses
import sys
import time

import numpy as np

from flowturbo import Pipeline

SAMPLERS = [
    {"schedule": "H1P5R3"},
    {"schedule": "H2P6"},
    {"solver": "heun", "steps": 4},
    {"solver": "ab2", "steps": 7},
    {"solver": "searched", "steps": 8},
    {"adaptive": "lte", "tolerance": 0.03},
]

with Pipeline.load(sys.argv[1]) as pipeline:
    classes = list(pipeline.manifest.model.classes)[:4]

    def sample(**sampler):
        """Return latents of one image per class, without decoding."""
        request = pipeline.request(classes, seeds=range(len(classes)), **sampler)
        return request.sampler.name, pipeline.run(dataclasses.replace(request, vae=None)).latents

    exact = sample(solver="heun", steps=100)[1]
    for sampler in SAMPLERS:
        started = time.perf_counter()
        name, latents = sample(**sampler)
        elapsed_ms = 1e3 * (time.perf_counter() - started) / len(classes)
        error = float(np.sqrt(np.mean((latents - exact) ** 2)))
        print(f"{name:12} error {error:.4f}   {elapsed_ms:.0f} ms per image")
