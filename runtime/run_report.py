"""What `run.json` says of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.execution.fixed_loop import Usage
from runtime.pipeline import Pipeline, describe
from runtime.request import Request
from runtime.sampling.controllers import Journal
from runtime.sampling.guidance import Branches
from runtime.sampling.plan import count
from runtime.system.json_codec import to_json


def noise_name(noise: NDArray[np.float32] | None) -> str | None:
    """Short hash of a noise file's contents, which stands in for the seed."""
    return None if noise is None else hashlib.sha256(np.ascontiguousarray(noise).tobytes()).hexdigest()[:12]


def mixture_name(image: Branches) -> str:
    """An image's class as file names have it: 207, or 207+250 for a mixture."""
    return "+".join(str(label) for label, _ in image.labels)


def run_report(
    pipeline: Pipeline, request: Request, usage: Usage, journals: Sequence[Journal], noise: str | None
) -> dict[str, Any]:
    """What ran, what it took, and for samplers that choose their steps the path of every image."""
    sampler = request.sampler
    images = [_image(pipeline, request, place, noise) for place in range(len(request.labels))]
    for image, journal in zip(images, journals, strict=False):
        image |= {
            "nfe": {**journal.nfe, "unguided": journal.unguided},
            "accepted": len(journal.accepted),
            "rejected": journal.rejected,
            "short": journal.short,
            "path": [to_json(step) for step in journal.steps],
        }
    return {
        "schema": 1,
        "engine": {
            "folder": str(pipeline.folder),
            "hash": pipeline.manifest.engine_hash,
            "resolution": pipeline.resolution,
        },
        "ran": describe(pipeline),
        "sampler": sampler.name,
        "settings": to_json(sampler.settings),
        "backwards": bool(sampler.settings.get("backwards")),
        "vae": request.vae,
        "guidance_channels": request.guidance_channels,
        "guidance_interval": [sampler.interval.start, sampler.interval.end],
        "noise": noise,
        "nfe": nfe_of(request, journals),
        "engine_calls": usage.calls,
        "images": images,
        "seconds": dict(usage.seconds),
    }


def nfe_of(request: Request, journals: Sequence[Journal]) -> dict[str, float]:
    """Evaluations of an image by network, their mean where every image takes its own.

    `unguided`, where there are any, are the predictor's outside the guidance interval: one row instead of two.
    """
    if journals:
        nfe = {n: float(np.mean([journal.nfe[n] for journal in journals])) for n in ("predictor", "refiner")}
        unguided = float(np.mean([journal.unguided for journal in journals]))
    else:
        plan = request.sampler.plan
        nfe = {"predictor": count(plan, "predictor"), "refiner": count(plan, "refiner")}
        unguided = sum(evaluation.network == "predictor" and not evaluation.guided for evaluation in plan)
    return {**nfe, **({"unguided": unguided} if unguided else {})}


def _image(pipeline: Pipeline, request: Request, place: int, noise: str | None) -> dict[str, Any]:
    branches, names = request.branches[place], pipeline.manifest.model.classes
    described: dict[str, Any] = {
        "class": request.labels[place],
        "name": names[request.labels[place]],
        "seed": request.seeds[place] if noise is None or request.sampler.draws else None,
        "guidance": request.scales[place],
    }
    if len(branches.labels) > 1:
        described["mixture"] = {str(label): weight for label, weight in branches.labels}
    if branches.other != pipeline.manifest.model.null_label:
        described["negative"] = branches.other
    return described
