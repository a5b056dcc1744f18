"""Compare samplers by their same-seed error: python examples/compare_samplers.py engines

The error is the distance of the latents from those of a very fine sampler that starts from the same noise.
"""

import dataclasses
import sys
import time

import numpy as np

from flowturbo import Pipeline

SAMPLERS = [
    {"sampler": "H1P5R3"},
    {"sampler": "H2P6"},
    {"sampler": "heun", "steps": 4},
    {"sampler": "ab2", "steps": 7},
    {"sampler": "searched", "steps": 8},
    {"sampler": "lte", "tolerance": 0.03},
]

with Pipeline.load(sys.argv[1]) as pipeline:
    classes = list(pipeline.manifest.model.classes)[:4]

    def sample(**options):
        """Return latents of one image per class, without decoding."""
        request = pipeline.request(classes, seeds=range(len(classes)), **options)
        return request.sampler.name, pipeline.run(dataclasses.replace(request, vae=None)).latents

    exact = sample(sampler="heun", steps=100)[1]
    for options in SAMPLERS:
        started = time.perf_counter()
        name, latents = sample(**options)
        elapsed_ms = 1e3 * (time.perf_counter() - started) / len(classes)
        error = float(np.sqrt(np.mean((latents - exact) ** 2)))
        print(f"{name:12} error {error:.4f}   {elapsed_ms:.0f} ms per image")
