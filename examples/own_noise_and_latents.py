"""Start from your own noise, keep the latents, go back to noise: python examples/own_noise_and_latents.py engines"""

import dataclasses
import sys

import numpy as np

from flowturbo import Pipeline

with Pipeline.load(sys.argv[1]) as pipeline:
    model = pipeline.manifest.model
    label, side = min(model.classes), pipeline.resolution // model.factor
    noise = np.random.default_rng(0).standard_normal((2, model.channels, side, side)).astype(np.float32)

    request = pipeline.request([label, label], sampler="heun", steps=20, guidance=1.0)
    latents_only = dataclasses.replace(request, vae=None)  # leaves the decoder out
    latents = pipeline.run(latents_only, noise=noise).latents  # float32 [2, C, H, W]
    np.save("latents.npy", latents)

    images = pipeline.decode(latents)  # uint8 [2, P, P, 3]
    print("latents", latents.shape, "images", images.shape)

    again = pipeline.reverse(latents, [label, label], sampler="heun", steps=20)  # from data to noise
    print("distance from the noise that we began with:", float(np.sqrt(np.mean((again - noise) ** 2))))
