"""Show progress, and stop when a time budget is over: python examples/progress_callback.py engines [SECONDS]"""

import sys
import time

from flowturbo import Pipeline

BUDGET = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0


class OutOfTime(Exception):
    """Raised by the callback to stop sampling."""


def show(event):
    """Print an event: a dict of index, evaluations, t and block. `evaluations` is None for adaptive samplers."""
    total = event["evaluations"] or "?"
    print(f"evaluation {event['index'] + 1} of {total}, block {event['block']}, t = {event['t']}")
    if time.monotonic() > deadline:
        raise OutOfTime


with Pipeline.load(sys.argv[1]) as pipeline:
    label = min(pipeline.manifest.model.classes)
    deadline = time.monotonic() + BUDGET
    try:
        pipeline.generate(label, sampler="H2P6", callback=show)
    except OutOfTime:
        print("stopped: the budget is over")
    images = pipeline.generate(label, sampler="H1P1")  # the pipeline still works after a stop
    print("the next picture:", images.shape)
