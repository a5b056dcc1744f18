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

from calibration.lowbit.fake_quantise import half_layers, int8_layers, with_clips
from calibration.lowbit.quality_meter import MOST_DB, Judge, Quality, Target, shown
from calibration.lowbit.trajectories import Deployment
from export.graphs.engine_graphs import DecoderGraph
from export.lowbit.choice import DEFAULT_METHOD, Choice
from export.lowbit.choice import SCHEMA as CHOICE_SCHEMA
from export.lowbit.islands import SOFTMAX
from export.lowbit.layers import block_of
from export.lowbit.ranges import Ranges
from flowturbo.evaluation.quality.same_seed import psnr
from runtime.images import to_uint8
from runtime.system.errors import RequestError
from runtime.system.version import VERSION

Say = Callable[[str], None]
DECODER_DB = 30.0
"""Where the target is none of pictures, a decoder below this in float16 is kept in float32: what a proof asks for."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        alone: each layer by itself in the low type; blocks: all of a block's.
        wide: what stays wide.
        every: all layers low; chosen: but for `wide`.
        reached: whether `chosen` holds the target.
        methods: all layers, by "method, plain" or "method, equalised"; method, equalised: the best of them. For int8.
        decoders: decibels of each in float16. For fp16.
    """

    alone: Mapping[str, Quality]
    blocks: Mapping[str, Quality]
    wide: tuple[str, ...]
    every: Quality
    chosen: Quality
    reached: bool
    methods: Mapping[str, Quality] = field(default_factory=dict)
    method: str = DEFAULT_METHOD
    equalised: bool = False
    decoders: Mapping[str, float] = field(default_factory=dict)


def search_int8(judge: Judge, ranges: Ranges, target: Target, methods: Sequence[str], say: Say) -> Found:
    """Best clips first, then the layers that stay wide.

    Args:
        methods: that are compared; each with equalised inputs and without.
    """
    compared: dict[str, Quality] = {}
    made = {
        kind: int8_layers(judge.deployment.by_role, ranges, DEFAULT_METHOD, equalised=kind) for kind in (False, True)
    }
    for method in methods:
        for equalised in (False, True):
            layers = with_clips(made[equalised], ranges, method, equalised=equalised)
            name = f"{method}, {'equalised' if equalised else 'plain'}"
            compared[name] = judge.measure(f"int8 {name} all", layers)
            say(f"  all layers, {name}: {shown(compared[name])}")
    best = min(compared, key=lambda name: compared[name].latent_rms)
    method, equalised = best.partition(", ")[0], best.endswith("equalised")
    layers = with_clips(made[equalised], ranges, method, equalised=equalised)
    found = _searched(judge, layers, f"int8 {best}", target, say)
    return replace(found, methods=compared, method=method, equalised=equalised)


def search_fp16(judge: Judge, target: Target, say: Say) -> Found:
    """Which layers, softmaxes and decoders need float32 in a build of float16."""
    networks = judge.deployment.by_role
    softmaxes = [f"{block}.{SOFTMAX}" for block in dict.fromkeys(map(block_of, judge.deployment.layers))]
    layers = half_layers(networks, [*judge.deployment.layers, *softmaxes])
    found = _searched(judge, layers, "fp16", target, say)
    return replace(found, decoders=half_decoders(judge, say))


def half_decoders(judge: Judge, say: Say) -> dict[str, float]:
    """Each decoder in float16 on the exact latents: decibels against float32, 0 where it overflows."""
    from export.trace import cast_vae

    found: dict[str, float] = {}
    latents = torch.from_numpy(judge.latents[:16])
    for variant, vae in judge.deployment.vaes.items():
        with torch.inference_mode():
            exact, _ = DecoderGraph(vae, torch.float32)(latents)
            rounded, finite = cast_vae(vae, DecoderGraph, torch.float16)(latents)
        decibels = (
            psnr(to_uint8(rounded.numpy()), to_uint8(exact.numpy())) if bool((finite == 1).all()) else np.zeros(1)
        )
        found[f"decoder-{variant}"] = min(float(np.median(decibels)), MOST_DB)
        say(f"  decoder-{variant} in float16: {found[f'decoder-{variant}']:.1f} dB")
    return found


def _searched(judge: Judge, layers: Mapping[str, nn.Module], what: str, target: Target, say: Say) -> Found:
    """Every part alone, every block, and the fewest that stay wide; `what` names the low type for what is kept."""

    def of(low: Collection[str]) -> Quality:
        return judge.measure(f"{what} {sorted(low)}", {name: layers[name] for name in layers if name in low})

    alone = {}
    for index, name in enumerate(layers, 1):
        alone[name] = of([name])
        say(f"  {index} of {len(layers)}: {name} alone: {shown(alone[name])}")
    blocks = {}
    for block in dict.fromkeys(map(block_of, layers)):
        blocks[block] = of([name for name in layers if block_of(name) == block])
        say(f"  {block} alone: {shown(blocks[block])}")
    every = of(list(layers))
    costs = {name: _weights(judge.deployment, name) for name in layers}
    wide = _fewest(layers, alone, costs, lambda kept: target.holds(of([n for n in layers if n not in kept])), say)
    chosen = of([n for n in layers if n not in wide])
    return Found(alone, blocks, wide, every, chosen, target.holds(chosen))


def _weights(deployment: Deployment, name: str) -> int:
    """What keeping a part wide costs: its weights, which go with its arithmetic and its bytes alike."""
    role, _, path = name.partition("/")
    if path.endswith(SOFTMAX):
        return deployment.by_role[role].config.width
    layer = deployment.by_role[role].get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer.weight.numel()


def _fewest(
    parts: Collection[str],
    alone: Mapping[str, Quality],
    costs: Mapping[str, int],
    holds: Callable[[Collection[str]], bool],
    say: Say,
) -> tuple[str, ...]:
    """The cheapest set of wide parts with which the target holds, as far as this search sees.

    Parts are ordered by the squared error that each brings alone, per weight. The shortest beginning of that order
    which holds is found by bisection; then parts of it go back one by one, the dearest first, while it still holds.
    """
    order = sorted(parts, key=lambda name: (-_per_cost(alone[name], costs[name]), name))
    if holds(()):
        return ()
    low, high = 0, len(order)  # order[:low] does not hold; order[:high] is the exact model
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(order[:middle]) else (middle, high)
        say(f"  {middle} of {len(order)} wide: {'holds' if high == middle else 'not enough'}")
    kept = list(order[:high])
    for name in sorted(kept, key=lambda name: -costs[name]):
        fewer = [other for other in kept if other != name]
        if holds(fewer):
            kept = fewer
    return tuple(sorted(kept))


def _per_cost(quality: Quality, cost: int) -> float:
    return quality.latent_rms**2 / cost if np.isfinite(quality.latent_rms) else np.inf


def choice_of(
    found: Found, precision: str, deployment: Deployment, ranges: Ranges | None, target: Target, command: str
) -> Choice:
    """What a build reads, with what was measured."""
    least = DECODER_DB if target.psnr_db is None else target.psnr_db
    decoders = tuple(name for name, db in found.decoders.items() if db < least)
    return Choice(
        CHOICE_SCHEMA,
        precision,
        deployment.model,
        (*found.wide, *decoders),
        "" if ranges is None else ranges.sha256,
        found.method,
        found.equalised,
        target.named,
        {
            "settings": deployment.settings,
            "all": _told(found.every),
            "chosen": _told(found.chosen),
            "methods": {name: _told(q) for name, q in found.methods.items()},
            "alone": {name: vars(q) for name, q in found.alone.items() if np.isfinite(q.latent_rms)},
            "overflowing": [name for name, q in found.alone.items() if not np.isfinite(q.latent_rms)],
            "blocks": {name: vars(q) for name, q in found.blocks.items() if np.isfinite(q.latent_rms)},
            "decoders": dict(found.decoders),
        },
        VERSION,
        command,
    )


def _told(quality: Quality) -> dict[str, float | None]:
    """For a file: an infinite distance, of what overflowed, is null there."""
    return {name: value if value is None or np.isfinite(value) else None for name, value in vars(quality).items()}


def table(found: Found) -> list[str]:
    """What was found, for the terminal: methods, blocks and the most sensitive layers, and the choice."""
    lines = [f"all layers, {name}: {shown(quality)}" for name, quality in found.methods.items()]
    lines += [f"{block} alone: {shown(quality)}" for block, quality in found.blocks.items()]
    worst = sorted(found.alone.items(), key=lambda item: -item[1].latent_rms)[:8]
    lines += [f"{name} alone: {shown(quality)}" for name, quality in worst]
    lines.append(f"all low: {shown(found.every)}")
    lines.append(f"kept wide: {', '.join(found.wide) or 'nothing'}: {shown(found.chosen)}")
    return lines


def check_reached(found: Found, target: Target) -> None:
    """Raises RequestError where the search ended without the target: not even the exact network reaches it."""
    if not found.reached:
        raise RequestError(
            f"the target {target.named} is not reached with any choice: {shown(found.chosen)}",
            remedy="ask for less, or measure with more images",
        )
