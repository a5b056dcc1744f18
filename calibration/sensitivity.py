"""What each layer costs in quality when it is quantised, over whole trajectories, and which ones are better kept wide.

Same seeds, same sampler: the exact model makes latents and pictures once, then every layer, every block, and every
choice the search looks at makes them again with those layers rounded (`calibration.fakequant`). What was measured is
kept aside, so that a stopped search goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calibration.fakequant import half_layers, int8_layers, replaced
from calibration.solver import SELECT
from calibration.trajectories import Deployment, sample
from export.choice import SCHEMA as CHOICE_SCHEMA
from export.choice import Choice
from export.graphs import DecoderGraph
from export.islands import SOFTMAX
from export.layers import block_of
from export.ranges import METHODS, Ranges
from flowturbo import demo
from flowturbo.evaluation.kept import digest
from flowturbo.evaluation.metrics import Moments, frechet_distance
from flowturbo.evaluation.populations import load_pack
from flowturbo.evaluation.reference import extractor_for
from flowturbo.evaluation.sameseed import latent_rms, psnr
from flowturbo.evaluation.sampling import Draw, balanced_draw
from runtime.errors import RequestError
from runtime.files import write_json
from runtime.images import to_uint8
from runtime.version import VERSION

Say = Callable[[str], None]
Pixels = NDArray[np.uint8]
MOST_DB = 120.0
"""What equal pictures count as."""


@dataclass(frozen=True)
class Quality:
    """Against the exact model: median distance of the latents, median decibels of the pictures (None: no decoder), and
    FID over the exact model's (None: not asked for)."""

    latent_rms: float
    psnr_db: float | None = None
    fid_ratio: float | None = None


@dataclass(frozen=True)
class Target:
    """What has to be reached: one of the three.

    Attributes:
        psnr_db: median of the pictures.
        latent_rms: median distance of the latents.
        fid_ratio: FID over the exact model's.
    """

    psnr_db: float | None = None
    latent_rms: float | None = None
    fid_ratio: float | None = None

    def holds(self, quality: Quality) -> bool:
        if self.psnr_db is not None:
            return quality.psnr_db is not None and quality.psnr_db >= self.psnr_db
        if self.fid_ratio is not None:
            return quality.fid_ratio is not None and quality.fid_ratio <= self.fid_ratio
        return self.latent_rms is not None and quality.latent_rms <= self.latent_rms

    @property
    def named(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}


class Judge:
    """The exact model's latents and pictures, and how far others are from them.

    Args:
        images: seeds that are looked at; calibrations and final reports use others.
        vae: decoder variant; None compares latents alone.
        kept: file of what was measured before.
        key: of everything that a measurement depends on beside its parts.
        first_seed: of the images.
        fid: of some pictures; None leaves it out.
    """

    def __init__(
        self,
        deployment: Deployment,
        images: int,
        batch: int,
        vae: str | None,
        kept: Path | None,
        key: Any,
        say: Say,
        *,
        first_seed: int = SELECT,
        fid: Callable[[Pixels], float] | None = None,
    ) -> None:
        self.deployment, self._batch, self._say, self._path = deployment, batch, say, kept
        self._draw: Draw = balanced_draw(sorted(deployment.networks.classes), images, first_seed)
        self._decoder = None if vae is None else DecoderGraph(deployment.vaes[vae], torch.float32)
        self._key = digest(
            [
                key,
                deployment.model,
                deployment.settings,
                images,
                first_seed,
                batch,
                vae,
                VERSION,
                torch.__version__,
                fid is None,
            ]
        )
        self._known: dict[str, Quality] = self._load()
        say(f"the exact model: {images} images")
        self.latents = self._latents()
        self.pictures = self._pictures(self.latents)
        self._fid = fid
        self._exact_fid = None if fid is None or self.pictures is None else fid(self.pictures)

    def measure(self, named: str, layers: Mapping[str, nn.Module]) -> Quality:
        """Quality with these layers in place; `named` says which, for what is kept."""
        name = digest(named)
        if name not in self._known:
            with replaced(self.deployment.by_role, layers):
                latents = self._latents()
            self._known[name] = self.quality(latents)
            self._save()
        return self._known[name]

    def quality(self, latents: NDArray[np.float32]) -> Quality:
        """Of some latents; those that are not finite are infinitely far."""
        if not np.isfinite(latents).all():
            return Quality(float("inf"), None if self.pictures is None else 0.0)
        pictures = self._pictures(latents)
        rms = float(np.median(latent_rms(latents, self.latents)))
        if pictures is None or self.pictures is None:
            return Quality(rms)
        ratio = None if self._fid is None or not self._exact_fid else self._fid(pictures) / self._exact_fid
        return Quality(rms, min(float(np.median(psnr(pictures, self.pictures))), MOST_DB), ratio)

    def _latents(self) -> NDArray[np.float32]:
        starts = range(0, len(self._draw), self._batch)
        parts = [self._draw.part(slice(start, start + self._batch)) for start in starts]
        return np.concatenate([sample(self.deployment, part.labels, part.seeds).numpy() for part in parts])

    def _pictures(self, latents: NDArray[np.float32]) -> Pixels | None:
        if self._decoder is None:
            return None
        made = []
        with torch.inference_mode():
            for start in range(0, len(latents), self._batch):
                images, _ = self._decoder(torch.from_numpy(latents[start : start + self._batch]))
                made.append(to_uint8(images.numpy()))
        return np.concatenate(made)

    def _load(self) -> dict[str, Quality]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            return {n: Quality(**q) for n, q in data["measured"].items()} if data["key"] == self._key else {}
        except (ValueError, KeyError, TypeError):
            return {}  # damaged: measured anew

    def _save(self) -> None:
        if self._path is not None:
            finite = {name: vars(q) for name, q in self._known.items() if np.isfinite(q.latent_rms)}
            write_json(self._path, {"key": self._key, "measured": finite})


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        alone: each layer by itself in the low type; blocks: all of a block's.
        methods: all layers, by "method, plain" or "method, equalised" (int8 alone).
        method, equalised: the best of them.
        wide: what stays wide.
        every: all layers low; chosen: but for `wide`.
        reached: whether `chosen` holds the target.
    """

    alone: Mapping[str, Quality]
    blocks: Mapping[str, Quality]
    methods: Mapping[str, Quality]
    method: str
    equalised: bool
    wide: tuple[str, ...]
    every: Quality
    chosen: Quality
    reached: bool
    decoders: Mapping[str, float] = field(default_factory=dict)


def search_int8(judge: Judge, ranges: Ranges, target: Target, methods: Sequence[str], say: Say) -> Found:
    """Best clips first, then the layers that stay wide.

    Args:
        methods: that are compared; each with equalised inputs and without.
    """
    compared: dict[str, Quality] = {}
    for method in methods:
        for equalised in (False, True):
            layers = int8_layers(judge.deployment.by_role, ranges, method, equalised=equalised)
            name = f"{method}, {'equalised' if equalised else 'plain'}"
            compared[name] = judge.measure(f"int8 {name} all", layers)
            say(f"  all layers, {name}: {shown(compared[name])}")
    best = min(compared, key=lambda name: compared[name].latent_rms)
    method, equalised = best.partition(", ")[0], best.endswith("equalised")
    layers = int8_layers(judge.deployment.by_role, ranges, method, equalised=equalised)
    return _searched(judge, layers, f"int8 {best}", target, say, compared, method, equalised)


def search_fp16(judge: Judge, target: Target, say: Say) -> Found:
    """Which layers, softmaxes and decoders need float32 in a build of float16."""
    networks = judge.deployment.by_role
    softmaxes = [f"{block}.{SOFTMAX}" for block in dict.fromkeys(map(block_of, judge.deployment.layers))]
    layers = half_layers(networks, [*judge.deployment.layers, *softmaxes])
    found = _searched(judge, layers, "fp16", target, say, {}, METHODS[-1], False)
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


def _searched(
    judge: Judge,
    layers: Mapping[str, nn.Module],
    what: str,
    target: Target,
    say: Say,
    methods: Mapping[str, Quality],
    method: str,
    equalised: bool,
) -> Found:
    def of(low: Collection[str]) -> Quality:
        return judge.measure(f"{what} {sorted(low)}", {name: layers[name] for name in layers if name in low})

    alone = {}
    for name in layers:
        alone[name] = of([name])
        say(f"  {name} alone: {shown(alone[name])}")
    blocks = {block: of([n for n in layers if block_of(n) == block]) for block in dict.fromkeys(map(block_of, layers))}
    every = of(list(layers))
    costs = {name: _weights(judge.deployment, name) for name in layers}
    wide = _fewest(layers, alone, costs, lambda kept: target.holds(of([n for n in layers if n not in kept])), say)
    chosen = of([n for n in layers if n not in wide])
    return Found(alone, blocks, methods, method, equalised, wide, every, chosen, target.holds(chosen))


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
    decoders = tuple(name for name, db in found.decoders.items() if db < (target.psnr_db or 30.0))
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
            "all": vars(found.every),
            "chosen": vars(found.chosen),
            "methods": {name: vars(q) for name, q in found.methods.items()},
            "alone": {name: vars(q) for name, q in found.alone.items() if np.isfinite(q.latent_rms)},
            "overflowing": [name for name, q in found.alone.items() if not np.isfinite(q.latent_rms)],
            "blocks": {name: vars(q) for name, q in found.blocks.items() if np.isfinite(q.latent_rms)},
            "decoders": dict(found.decoders),
        },
        VERSION,
        command,
    )


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
    """Raises RequestError where not even the exact model's twin reaches the target."""
    if not found.reached:
        raise RequestError(
            f"the target {target.named} is not reached with any choice: {shown(found.chosen)}",
            remedy="ask for less, or measure with more images",
        )


def shown(quality: Quality) -> str:
    """In a line of progress."""
    seen = "" if quality.psnr_db is None else f", pictures {quality.psnr_db:.1f} dB"
    ratio = "" if quality.fid_ratio is None else f", FID {quality.fid_ratio:.3f} ×"
    return f"latents {quality.latent_rms:.4f} apart{seen}{ratio}"


@contextmanager
def demo_fid() -> Iterator[Callable[[Pixels], float]]:
    """The demo's FID of some pictures, by the extractor and reference that come with the package."""
    reference = load_pack(demo.REFERENCE).population.moments
    assert reference is not None
    with extractor_for(None, demo.REFERENCE, None, None, "cpu") as extractor:
        yield lambda pictures: float(frechet_distance(Moments.of(extractor.extract(pictures).features), reference))
