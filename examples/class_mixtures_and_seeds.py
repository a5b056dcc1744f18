"""Mix two classes, move away from a third, and use one seed for several classes:
python examples/class_mixtures_and_seeds.py engines"""

import sys

import numpy as np
from PIL import Image

from flowturbo import Pipeline

with Pipeline.load(sys.argv[1]) as pipeline:
    first, second, third = list(pipeline.manifest.model.classes)[:3]
    classes = [first, f"{first}:0.7,{second}:0.3", f"{first}:0.3,{second}:0.7", second]
    row = pipeline.generate(classes, seeds=[0, 0, 0, 0], guidance=3.0)  # one seed: the same noise in four classes
    away = pipeline.generate([first] * 4, seeds=range(4), guidance=[1.5, 2, 3, 4], negative=third)
    alone = pipeline.generate(classes[1], seeds=0, guidance=3.0)

difference = np.abs(row[1].astype(int) - alone[0]).max()  # a picture depends on its seed alone, but for rounding
print("largest difference between a picture in a batch and alone:", difference)
Image.fromarray(np.vstack([np.hstack(list(row)), np.hstack(list(away))])).save("mixtures.png")
print("mixtures.png: first row one seed in four classes, second row four seeds and four guidance scales")
