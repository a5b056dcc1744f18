"""Measure what each layer costs in quality when it is quantised, over whole trajectories, and which must stay wide.

Same seeds, same sampler: the exact model makes latents and pictures once. Then every layer, every block, and every
choice of the search makes them again with those layers rounded (`fake_quantise`). Measurements are stored, so that a
stopped search goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from calibration.lowbit.fake_quantise import make_float16_layers, make_int8_layers, replace_clips
from calibration.lowbit.quality_meter import MAX_DB, Quality, QualityMeter, QualityTarget, format_quality
from calibration.lowbit.trajectories import Deployment
from calibration.model import find_linear
from export.graphs.engine_graphs import DecoderGraph
from export.lowbit.casting import SOFTMAX, cast_vae
from export.lowbit.choice import CHOICE_SCHEMA, DEFAULT_CLIP_METHOD, PrecisionChoice
from export.lowbit.layers import find_block
from export.lowbit.ranges import Ranges
from flowturbo.evaluation.quality.same_seed import psnr
from runtime.images import convert_to_uint8
from runtime.system.errors import RequestError
from runtime.system.progress import SILENT, Progress
from runtime.system.version import VERSION

MIN_DECODER_DB = 30.0
"""Where the target is not of pictures, a decoder below this in float16 stays in float32: the limit of a proof."""


@dataclass(frozen=True)
class SensitivityResult:
    """The result of a search.

    Attributes:
        alone: quality with each layer alone in the low type.
        blocks: quality with all layers of a block in the low type.
        wide: layers that stay wide.
        all_low: quality with all layers in the low type.
        chosen: quality with all layers in the low type but for `wide`.
        is_reached: whether `chosen` reaches the target.
        methods: for int8, quality with all layers low, by "method, plain" or "method, equalised".
        method, equalised: the best of `methods`.
        decoders: for fp16, decibels of each in float16.
    """

    alone: Mapping[str, Quality]
    blocks: Mapping[str, Quality]
    wide: tuple[str, ...]
    all_low: Quality
    chosen: Quality
    is_reached: bool
    methods: Mapping[str, Quality] = field(default_factory=dict)
    method: str = DEFAULT_CLIP_METHOD
    equalised: bool = False
    decoders: Mapping[str, float] = field(default_factory=dict)


def search_int8(
    meter: QualityMeter, ranges: Ranges, target: QualityTarget, methods: Sequence[str], progress: Progress = SILENT
) -> SensitivityResult:
    """Find the best clips first, then the layers that stay wide.

    Args:
        methods: clips to compare, each with equalised inputs and without.
    """
    qualities: dict[str, Quality] = {}
    layers_by_kind = {
        kind: make_int8_layers(meter.deployment.networks.by_role, ranges, DEFAULT_CLIP_METHOD, equalised=kind)
        for kind in (False, True)
    }
    for method in methods:
        for equalised in (False, True):
            layers = replace_clips(layers_by_kind[equalised], ranges, method, equalised=equalised)
            name = f"{method}, {'equalised' if equalised else 'plain'}"
            qualities[name] = meter.measure(f"int8 {name} all", layers)
            progress.write(f"  all layers, {name}: {format_quality(qualities[name])}")
    best = min(qualities, key=lambda name: qualities[name].latent_rms)
    method, equalised = best.partition(", ")[0], best.endswith("equalised")
    layers = replace_clips(layers_by_kind[equalised], ranges, method, equalised=equalised)
    result = _search_wide_parts(meter, layers, f"int8 {best}", target, progress)
    return replace(result, methods=qualities, method=method, equalised=equalised)


def search_fp16(meter: QualityMeter, target: QualityTarget, progress: Progress = SILENT) -> SensitivityResult:
    """Find the layers, softmaxes and decoders that need float32 in a build of float16."""
    networks = meter.deployment.networks.by_role
    softmaxes = [f"{block}.{SOFTMAX}" for block in dict.fromkeys(map(find_block, meter.deployment.layers))]
    layers = make_float16_layers(networks, [*meter.deployment.layers, *softmaxes])
    result = _search_wide_parts(meter, layers, "fp16", target, progress)
    return replace(result, decoders=measure_float16_decoders(meter, progress))


def measure_float16_decoders(meter: QualityMeter, progress: Progress = SILENT) -> dict[str, float]:
    """Return the decibels of each decoder in float16 against float32 on the exact latents, 0 where it overflows."""
    decoder_db: dict[str, float] = {}
    latents = torch.from_numpy(meter.latents[:16])
    for variant, vae in meter.deployment.vaes.items():
        with torch.inference_mode():
            exact, _ = DecoderGraph(vae, torch.float32)(latents)
            rounded, finite = cast_vae(vae, DecoderGraph, torch.float16)(latents)
        decibels = (
            psnr(convert_to_uint8(rounded.numpy()), convert_to_uint8(exact.numpy()))
            if bool((finite == 1).all())
            else np.zeros(1)
        )
        decoder_db[f"decoder-{variant}"] = min(float(np.median(decibels)), MAX_DB)
        progress.write(f"  decoder-{variant} in float16: {decoder_db[f'decoder-{variant}']:.1f} dB")
    return decoder_db


def _search_wide_parts(
    meter: QualityMeter, layers: Mapping[str, nn.Module], description: str, target: QualityTarget, progress: Progress
) -> SensitivityResult:
    """Measure every part alone and every block, and find the fewest that must stay wide.

    Args:
        description: names the low type in the cache of the meter.
    """

    def measure_low(low: Collection[str]) -> Quality:
        return meter.measure(f"{description} {sorted(low)}", {name: layers[name] for name in layers if name in low})

    alone = {}
    for index, name in enumerate(layers, 1):
        alone[name] = measure_low([name])
        progress.write(f"  {index} of {len(layers)}: {name} alone: {format_quality(alone[name])}")
    blocks = {}
    for block in dict.fromkeys(map(find_block, layers)):
        blocks[block] = measure_low([name for name in layers if find_block(name) == block])
        progress.write(f"  {block} alone: {format_quality(blocks[block])}")
    all_low = measure_low(list(layers))
    networks = meter.deployment.networks.by_role
    costs = {  # of keeping a part wide, in arithmetic and in bytes
        name: networks[name.partition("/")[0]].config.width
        if name.endswith(SOFTMAX)
        else find_linear(networks, name).weight.numel()
        for name in layers
    }
    wide = _find_fewest_wide(
        layers,
        alone,
        costs,
        lambda wide_parts: target.is_met_by(measure_low([n for n in layers if n not in wide_parts])),
        progress,
    )
    chosen = measure_low([n for n in layers if n not in wide])
    return SensitivityResult(alone, blocks, wide, all_low, chosen, target.is_met_by(chosen))


def _find_fewest_wide(
    parts: Collection[str],
    alone: Mapping[str, Quality],
    costs: Mapping[str, int],
    is_met: Callable[[Collection[str]], bool],
    progress: Progress = SILENT,
) -> tuple[str, ...]:
    """Find a cheap set of wide parts with which the target holds.

    Parts are ordered by the squared error that each brings alone, per weight. Bisection finds the shortest beginning of
    that order which holds. Then parts of it become low one by one, the dearest first, while it still holds.
    """

    def measure_benefit(name: str) -> float:
        rms = alone[name].latent_rms
        return rms**2 / costs[name] if np.isfinite(rms) else np.inf

    order = sorted(parts, key=lambda name: (-measure_benefit(name), name))
    if is_met(()):
        return ()
    low, high = 0, len(order)  # order[:low] does not hold; order[:high] is the exact model
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_met(order[:middle]) else (middle, high)
        progress.write(f"  {middle} of {len(order)} wide: {'holds' if high == middle else 'not enough'}")
    wide = list(order[:high])
    for name in sorted(wide, key=lambda name: -costs[name]):
        narrower = [other for other in wide if other != name]
        if is_met(narrower):
            wide = narrower
    return tuple(sorted(wide))


def make_choice(
    result: SensitivityResult,
    precision: str,
    deployment: Deployment,
    ranges: Ranges | None,
    target: QualityTarget,
    command: str,
) -> PrecisionChoice:
    """Return the choice that a build reads, with the measurements."""
    min_decoder_db = MIN_DECODER_DB if target.psnr_db is None else target.psnr_db
    decoders = tuple(name for name, db in result.decoders.items() if db < min_decoder_db)
    return PrecisionChoice(
        CHOICE_SCHEMA,
        precision,
        deployment.model,
        (*result.wide, *decoders),
        "" if ranges is None else ranges.sha256,
        result.method,
        result.equalised,
        target.limits,
        {
            "settings": deployment.settings,
            "all": _quality_to_json(result.all_low),
            "chosen": _quality_to_json(result.chosen),
            "methods": {name: _quality_to_json(q) for name, q in result.methods.items()},
            "alone": {name: vars(q) for name, q in result.alone.items() if np.isfinite(q.latent_rms)},
            "overflowing": [name for name, q in result.alone.items() if not np.isfinite(q.latent_rms)],
            "blocks": {name: vars(q) for name, q in result.blocks.items() if np.isfinite(q.latent_rms)},
            "decoders": dict(result.decoders),
        },
        VERSION,
        command,
    )


def _quality_to_json(quality: Quality) -> dict[str, float | None]:
    """Replace the infinite distance of an overflow by null."""
    return {name: value if value is None or np.isfinite(value) else None for name, value in vars(quality).items()}


def format_result(result: SensitivityResult) -> list[str]:
    """Return lines for the terminal: methods, blocks, the most sensitive layers, and the choice."""
    lines = [f"all layers, {name}: {format_quality(quality)}" for name, quality in result.methods.items()]
    lines += [f"{block} alone: {format_quality(quality)}" for block, quality in result.blocks.items()]
    worst = sorted(result.alone.items(), key=lambda item: -item[1].latent_rms)[:8]
    lines += [f"{name} alone: {format_quality(quality)}" for name, quality in worst]
    lines.append(f"all low: {format_quality(result.all_low)}")
    lines.append(f"kept wide: {', '.join(result.wide) or 'nothing'}: {format_quality(result.chosen)}")
    return lines


def check_target_reached(result: SensitivityResult, target: QualityTarget) -> None:
    """Raise RequestError if the search ended without the target: not even the exact network reaches it."""
    if not result.is_reached:
        raise RequestError(
            f"the target {target.limits} is not reached with any choice: {format_quality(result.chosen)}",
            remedy="ask for less, or measure with more images",
        )
