"""What each layer costs in quality when it is quantised, over whole trajectories, and which ones are better kept wide.

Same seeds, same sampler: the exact model makes latents and pictures once, then every layer, every block, and every
choice the search looks at makes them again with those layers rounded (`fake_quantise`). What was measured is kept
aside, so that a stopped search goes on.
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
from export.graphs.engine_graphs import DecoderGraph
from export.lowbit.casting import SOFTMAX
from export.lowbit.choice import CHOICE_SCHEMA, DEFAULT_CLIP_METHOD, PrecisionChoice
from export.lowbit.layers import find_block
from export.lowbit.ranges import Ranges
from flowturbo.evaluation.quality.same_seed import psnr
from runtime.images import convert_to_uint8
from runtime.system.errors import RequestError
from runtime.system.version import VERSION

Say = Callable[[str], None]
MIN_DECODER_DB = 30.0
"""Where the target is none of pictures, a decoder below this in float16 is kept in float32: what a proof asks for."""


@dataclass(frozen=True)
class SensitivityResult:
    """What a search found.

    Attributes:
        alone: each layer by itself in the low type; blocks: all of a block's.
        wide: what stays wide.
        all_low: all layers low; chosen: but for `wide`.
        is_reached: whether `chosen` holds the target.
        methods: all layers, by "method, plain" or "method, equalised"; method, equalised: the best of them. For int8.
        decoders: decibels of each in float16. For fp16.
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
    meter: QualityMeter, ranges: Ranges, target: QualityTarget, methods: Sequence[str], say: Say
) -> SensitivityResult:
    """Best clips first, then the layers that stay wide.

    Args:
        methods: that are compared; each with equalised inputs and without.
    """
    qualities: dict[str, Quality] = {}
    layers_by_kind = {
        kind: make_int8_layers(meter.deployment.by_role, ranges, DEFAULT_CLIP_METHOD, equalised=kind)
        for kind in (False, True)
    }
    for method in methods:
        for equalised in (False, True):
            layers = replace_clips(layers_by_kind[equalised], ranges, method, equalised=equalised)
            name = f"{method}, {'equalised' if equalised else 'plain'}"
            qualities[name] = meter.measure(f"int8 {name} all", layers)
            say(f"  all layers, {name}: {format_quality(qualities[name])}")
    best = min(qualities, key=lambda name: qualities[name].latent_rms)
    method, equalised = best.partition(", ")[0], best.endswith("equalised")
    layers = replace_clips(layers_by_kind[equalised], ranges, method, equalised=equalised)
    result = _search_wide_parts(meter, layers, f"int8 {best}", target, say)
    return replace(result, methods=qualities, method=method, equalised=equalised)


def search_fp16(meter: QualityMeter, target: QualityTarget, say: Say) -> SensitivityResult:
    """Which layers, softmaxes and decoders need float32 in a build of float16."""
    networks = meter.deployment.by_role
    softmaxes = [f"{block}.{SOFTMAX}" for block in dict.fromkeys(map(find_block, meter.deployment.layers))]
    layers = make_float16_layers(networks, [*meter.deployment.layers, *softmaxes])
    result = _search_wide_parts(meter, layers, "fp16", target, say)
    return replace(result, decoders=measure_float16_decoders(meter, say))


def measure_float16_decoders(meter: QualityMeter, say: Say) -> dict[str, float]:
    """Each decoder in float16 on the exact latents: decibels against float32, 0 where it overflows."""
    from export.lowbit.casting import cast_vae

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
        say(f"  decoder-{variant} in float16: {decoder_db[f'decoder-{variant}']:.1f} dB")
    return decoder_db


def _search_wide_parts(
    meter: QualityMeter, layers: Mapping[str, nn.Module], description: str, target: QualityTarget, say: Say
) -> SensitivityResult:
    """Measure every part alone and every block, and find the fewest that must stay wide.

    Args:
        description: names the low type in what is saved.
    """

    def measure_low(low: Collection[str]) -> Quality:
        return meter.measure(f"{description} {sorted(low)}", {name: layers[name] for name in layers if name in low})

    alone = {}
    for index, name in enumerate(layers, 1):
        alone[name] = measure_low([name])
        say(f"  {index} of {len(layers)}: {name} alone: {format_quality(alone[name])}")
    blocks = {}
    for block in dict.fromkeys(map(find_block, layers)):
        blocks[block] = measure_low([name for name in layers if find_block(name) == block])
        say(f"  {block} alone: {format_quality(blocks[block])}")
    all_low = measure_low(list(layers))
    costs = {name: _count_weights(meter.deployment, name) for name in layers}
    wide = _find_fewest_wide(
        layers,
        alone,
        costs,
        lambda wide_parts: target.is_met_by(measure_low([n for n in layers if n not in wide_parts])),
        say,
    )
    chosen = measure_low([n for n in layers if n not in wide])
    return SensitivityResult(alone, blocks, wide, all_low, chosen, target.is_met_by(chosen))


def _count_weights(deployment: Deployment, name: str) -> int:
    """What keeping a part wide costs: its weights, which go with its arithmetic and its bytes alike."""
    role, _, path = name.partition("/")
    if path.endswith(SOFTMAX):
        return deployment.by_role[role].config.width
    layer = deployment.by_role[role].get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer.weight.numel()


def _find_fewest_wide(
    parts: Collection[str],
    alone: Mapping[str, Quality],
    costs: Mapping[str, int],
    is_met: Callable[[Collection[str]], bool],
    say: Say,
) -> tuple[str, ...]:
    """The cheapest set of wide parts with which the target holds, as far as this search sees.

    Parts are ordered by the squared error that each brings alone, per weight. The shortest beginning of that order
    which holds is found by bisection; then parts of it go back one by one, the dearest first, while it still holds.
    """
    order = sorted(parts, key=lambda name: (-_divide_by_cost(alone[name], costs[name]), name))
    if is_met(()):
        return ()
    low, high = 0, len(order)  # order[:low] does not hold; order[:high] is the exact model
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_met(order[:middle]) else (middle, high)
        say(f"  {middle} of {len(order)} wide: {'holds' if high == middle else 'not enough'}")
    wide = list(order[:high])
    for name in sorted(wide, key=lambda name: -costs[name]):
        narrower = [other for other in wide if other != name]
        if is_met(narrower):
            wide = narrower
    return tuple(sorted(wide))


def _divide_by_cost(quality: Quality, cost: int) -> float:
    return quality.latent_rms**2 / cost if np.isfinite(quality.latent_rms) else np.inf


def make_choice(
    result: SensitivityResult,
    precision: str,
    deployment: Deployment,
    ranges: Ranges | None,
    target: QualityTarget,
    command: str,
) -> PrecisionChoice:
    """What a build reads, with what was measured."""
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
    """For a file: an infinite distance, of what overflowed, is null there."""
    return {name: value if value is None or np.isfinite(value) else None for name, value in vars(quality).items()}


def format_result(result: SensitivityResult) -> list[str]:
    """What was found, for the terminal: methods, blocks and the most sensitive layers, and the choice."""
    lines = [f"all layers, {name}: {format_quality(quality)}" for name, quality in result.methods.items()]
    lines += [f"{block} alone: {format_quality(quality)}" for block, quality in result.blocks.items()]
    worst = sorted(result.alone.items(), key=lambda item: -item[1].latent_rms)[:8]
    lines += [f"{name} alone: {format_quality(quality)}" for name, quality in worst]
    lines.append(f"all low: {format_quality(result.all_low)}")
    lines.append(f"kept wide: {', '.join(result.wide) or 'nothing'}: {format_quality(result.chosen)}")
    return lines


def check_target_reached(result: SensitivityResult, target: QualityTarget) -> None:
    """Raises RequestError where the search ended without the target: not even the exact network reaches it."""
    if not result.is_reached:
        raise RequestError(
            f"the target {target.limits} is not reached with any choice: {format_quality(result.chosen)}",
            remedy="ask for less, or measure with more images",
        )
