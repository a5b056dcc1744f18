"""Make two pictures and save them: python examples/generate.py engines"""

import sys

from PIL import Image

from flowturbo import Pipeline

with Pipeline.load(sys.argv[1]) as pipeline:
    label, name = next(iter(pipeline.manifest.model.classes.items()))  # the first class that the model knows
    images = pipeline.generate([label, label], seeds=[0, 1])  # uint8 [2, H, W, 3]

for seed, image in enumerate(images):
    Image.fromarray(image).save(f"class{label}-seed{seed}.png")
    print(f"{name}: class{label}-seed{seed}.png")
