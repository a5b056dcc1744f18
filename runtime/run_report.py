"""Build the contents of `run.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.execution.fixed_loop import Usage
from runtime.pipeline import Pipeline, describe_pipeline
from runtime.request import Request
from runtime.sampling.controllers import Journal
from runtime.sampling.guidance import ImageCondition
from runtime.sampling.plan import count_evaluations
from runtime.system.json_codec import to_json


def hash_noise(noise: NDArray[np.float32] | None) -> str | None:
    """Return a short hash of a noise file's contents, which replaces the seed in reports; None without noise."""
    return None if noise is None else hashlib.sha256(np.ascontiguousarray(noise).tobytes()).hexdigest()[:12]


def format_mixture(image: ImageCondition) -> str:
    """Format an image's class for file names: 207, or 207+250 for a mixture."""
    return "+".join(str(label) for label, _ in image.weighted_labels)


def build_run_report(
    pipeline: Pipeline, request: Request, usage: Usage, journals: Sequence[Journal], noise: str | None
) -> dict[str, Any]:
    """Report what ran, its cost, and for adaptive samplers the path of every image."""
    sampler = request.sampler
    images: list[dict[str, Any]] = []
    for index, (label, condition) in enumerate(zip(request.labels, request.conditions, strict=True)):
        entry: dict[str, Any] = {
            "class": label,
            "name": pipeline.manifest.model.classes[label],
            "seed": request.seeds[index] if noise is None or sampler.num_draws else None,
            "guidance": request.scales[index],
        }
        if len(condition.weighted_labels) > 1:
            entry["mixture"] = {str(mixed_label): weight for mixed_label, weight in condition.weighted_labels}
        if condition.negative_label != pipeline.manifest.model.null_label:
            entry["negative"] = condition.negative_label
        images.append(entry)
    for image, journal in zip(images, journals, strict=False):
        image |= {
            "nfe": {**journal.nfe, "unguided": journal.unguided_nfe},
            "accepted": len(journal.accepted),
            "rejected": journal.rejected,
            "short": journal.is_budget_limited,
            "path": [to_json(step) for step in journal.steps],
        }
    return {
        "schema": 1,
        "engine": {
            "folder": str(pipeline.folder),
            "hash": pipeline.manifest.engine_hash,
            "resolution": pipeline.resolution,
        },
        "ran": describe_pipeline(pipeline),
        "sampler": sampler.name,
        "settings": to_json(sampler.settings),
        "backwards": bool(sampler.settings.get("backwards")),
        "vae": request.vae,
        "guidance_channels": request.guidance_channels,
        "guidance_interval": [sampler.interval.start, sampler.interval.end],
        "noise": noise,
        "nfe": count_nfe(request, journals),
        "engine_calls": usage.calls,
        "images": images,
        "seconds": dict(usage.seconds),
    }


def count_nfe(request: Request, journals: Sequence[Journal]) -> dict[str, float]:
    """Count the evaluations of an image by network; their mean where every image takes its own steps.

    `unguided`, where there are any, are the predictor's outside the guidance interval: one row instead of two.
    """
    if journals:
        nfe = {n: float(np.mean([journal.nfe[n] for journal in journals])) for n in ("predictor", "refiner")}
        unguided = float(np.mean([journal.unguided_nfe for journal in journals]))
    else:
        plan = request.sampler.plan
        nfe = {"predictor": count_evaluations(plan, "predictor"), "refiner": count_evaluations(plan, "refiner")}
        unguided = sum(evaluation.network == "predictor" and not evaluation.guided for evaluation in plan)
    return {**nfe, **({"unguided": unguided} if unguided else {})}
