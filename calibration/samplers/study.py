"""The study of samplers: same-seed error and wall time of every sampler on one engine directory, and how to choose.

Written as a page with tables and plots; every number in it is measured in the one run that writes it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.plot import Sheet, error_panel
from calibration.samplers.block_search import mean_schedule
from calibration.samplers.probe import FITTED, Guidance, Measured, Probe, tenths
from flowturbo.evaluation.quality.same_seed import REFERENCE
from flowturbo.evaluation.quality.sampled_latents import balanced_draw
from runtime.pipeline import Pipeline, describe
from runtime.request import RequestOptions
from runtime.sampling.controllers import Journal
from runtime.sampling.solvers import RULES
from runtime.sampling.tableaus import SEARCHED
from runtime.system.files import make_folder, replacing, write_json
from runtime.system.hashes import cache_folder

Say = Callable[[str], None]
Samplers = Mapping[str, Sequence[Mapping[str, Any]]]
TOLERANCES = (0.3, 0.1, 0.03, 0.01)
FINE_TOLERANCES = (0.003, 0.001)
"""Of lte only: what its error goes to, where a step's error is small."""
CONSTANTS = (0.35, 0.25, 0.17, 0.11)
PUBLISHED = ("H1P5R3", "H2P4R2", "H2P8R2", "H5P7R3")
"""FlowTurbo's schedules that a small device may run."""
BUDGETS = (4, 6, 8, 12)
"""Predictor evaluations that the recommendations are for."""


def families(pipeline: Pipeline, frozen: Callable[[int], tuple[float, ...]]) -> Samplers:
    """Samplers by family, each from coarse to fine: keyword arguments of `Pipeline.request`."""
    steps, pseudo = (3, 4, 5, 7, 9, 11), (2, 3, 4, 6, 8, 10)
    every: dict[str, list[Mapping[str, Any]]] = {
        "Euler": [{"solver": "euler", "steps": n} for n in (4, 6, 8, 12)],
        "Heun": [{"solver": "heun", "steps": n} for n in (2, 3, 4, 6)],
        "AB2": [{"solver": "ab2", "steps": n} for n in steps],
        "AB3": [{"solver": "ab3", "steps": n} for n in (3, 5, 8)],
        "H1Pn": [{"schedule": f"H1P{n}"} for n in pseudo],
        "H1Pn, lte grid": [{"schedule": f"H1P{n}", "grid": frozen(n + 1)} for n in pseudo],
        "AB2, lte grid": [{"solver": "ab2", "grid": frozen(n)} for n in (3, 5, 7, 11)],
        "searched (published)": [{"solver": "searched", "steps": n} for n in sorted(SEARCHED)],
        "adaptive norm": [{"adaptive": "norm", "constant": c} for c in CONSTANTS],
        "adaptive lte": [{"adaptive": "lte", "tolerance": tau} for tau in (*TOLERANCES, *FINE_TOLERANCES)],
        "dopri5": [{"solver": "dopri5", "tolerance": tau} for tau in (1e-1, 1e-2)],
    }
    tables = [saved for saved in pipeline.manifest.samplers if saved.kind == "table"]
    plain = sorted((s for s in tables if not s.refiner), key=lambda s: len(s.grid or ()))
    if plain:
        every["searched (this model)"] = [{"schedule": saved.name} for saved in plain]
    if pipeline.manifest.model.refiner is not None:
        every["FlowTurbo (paper)"] = [{"schedule": name} for name in PUBLISHED]
        every["H1Pn + R3"] = [{"schedule": f"H1P{n}R3"} for n in (4, 6, 8, 10)]
        every["adaptive blocks"] = [{"adaptive": "blocks", "tolerance": tau} for tau in TOLERANCES]
        if refined := sorted((s for s in tables if s.refiner), key=lambda s: len(s.grid or ())):
            every["searched + R (this model)"] = [{"schedule": saved.name} for saved in refined]
    return every


@dataclass(frozen=True)
class Half:
    """The study under one guidance: measurements by family."""

    guidance: Guidance
    results: Mapping[str, Sequence[Measured]]

    def all(self) -> list[tuple[str, Measured]]:
        return [(family, measured) for family, results in self.results.items() for measured in results]


def run_study(
    pipeline: Pipeline,
    images: int,
    guidance: Guidance,
    within: Guidance,
    out: Path,
    figures: Path,
    command: str,
    say: Say,
) -> None:
    """Measures every family under both guidances and writes the page, its plots and its numbers (`.json`)."""
    halves = [_half(pipeline, images, how, say) for how in (guidance, within)]
    make_folder(figures)
    shown = (("NFE of the predictor", _evaluations), ("ms per image, sampling only", _milliseconds))
    for half, name in zip(halves, ("samplers", "samplers-interval"), strict=True):
        sheet = Sheet(2, width=6.4, height=5.2)
        for axes, (label, cost) in zip(sheet.axes, shown, strict=True):
            points = {family: [(cost(m), m.error) for m in results] for family, results in half.results.items()}
            error_panel(axes, points, label, _guided(half.guidance), legend=axes is sheet.axes[0])
        sheet.save(figures / f"{name}.png")
    page = _page(pipeline, images, halves, command, figures, out)
    with replacing(out) as aside:
        aside.write_text(page, encoding="utf-8")
    write_json(out.with_suffix(".json"), _numbers(pipeline, images, halves, command))


def _half(pipeline: Pipeline, images: int, guidance: Guidance, say: Say) -> Half:
    say(f"{_guided(guidance)}: a very fine run of {images} images")
    cache = cache_folder()
    probe = Probe(
        pipeline, images, guidance, cache=None if cache is None else cache / "calibration", report=tenths(say)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of refiner steps longer than trained for: the study shows what they do
        probe.first(min(images, pipeline.manifest.max_batch)).measure(solver="euler", steps=4)  # warms up
        journals = adaptive_paths(pipeline, min(images, 256), guidance)
        results: dict[str, list[Measured]] = {}
        for family, samplers in families(pipeline, lambda n: mean_schedule(journals, n)).items():
            results[family] = [probe.measure(**sampler) for sampler in samplers]
            last = results[family][-1]
            say(f"  {family}: down to {last.error:.4f} with {last.predictor:.1f} evaluations")
    return Half(guidance, results)


def adaptive_paths(pipeline: Pipeline, images: int, guidance: Guidance) -> Sequence[Journal]:
    """The steps that lte takes at tolerance 0.01, on other seeds than those that the study judges."""
    draw = balanced_draw(sorted(pipeline.manifest.model.classes), images, FITTED)
    options: RequestOptions = {**guidance.options, "adaptive": "lte", "tolerance": 0.01, "seeds": draw.seeds}
    return pipeline.run(replace(pipeline.request(list(draw.labels), **options), vae=None)).journals


def _evaluations(measured: Measured) -> float:
    return measured.predictor


def _milliseconds(measured: Measured) -> float:
    return 1e3 * measured.seconds


def _guided(guidance: Guidance) -> str:
    if guidance.interval == (0.0, 1.0):
        return "guidance throughout"
    return f"guidance for t in {guidance.interval[0]:g} … {guidance.interval[1]:g} only"


def _page(pipeline: Pipeline, images: int, halves: Sequence[Half], command: str, figures: Path, out: Path) -> str:
    ran = describe(pipeline)
    scale = halves[0].guidance.scale or pipeline.manifest.defaults.guidance
    where = Path(*figures.resolve().relative_to(out.resolve().parent).parts) if _below(figures, out) else figures
    lines = [
        "# How to choose a sampler",
        "",
        f"Written by `{command}`; do not edit. {images} images (seeds 0–{images - 1}, classes take turns), "
        f"guidance {scale:g}. Engines {pipeline.manifest.engine_hash} ({pipeline.resolution} px) on {ran['provider']}, "
        f"{ran['device']}, {ran['precision']}, batches of {pipeline.manifest.max_batch}.",
        "",
        "- **Error** is the same-seed error: the root mean square distance of the latents from those of Heun with "
        f"{REFERENCE['steps']} steps on the same engines and noise, mean over images. The standard deviation of a "
        "latent is about 1. The error measures the sampler alone, not the model.",
        "- **NFE** counts predictor + refiner evaluations, a guided one as one.",
        "- **ms** is the wall time of an image without decoding, in this run. Compare within the page: other machines "
        "have other times.",
        "",
        f"![error over evaluations and time]({where.as_posix()}/samplers.png)",
        "",
        "## Recommendations",
        "",
        "The sampler with the least error, of those with at most so many predictor evaluations. Refiner evaluations "
        "are not counted.",
        "",
        *_recommendations(halves),
        "",
        "## Questions",
        "",
        *_answers(halves[0]),
    ]
    for half in halves:
        lines += ["", f"## Every sampler, {_guided(half.guidance)}", ""]
        if half is halves[1]:
            saved = (
                "Outside the interval the unguided branch is not evaluated. The last column counts such evaluations."
            )
            lines += [f"![with a guidance interval]({where.as_posix()}/samplers-interval.png)", "", saved, ""]
        lines += _table(half)
    return "\n".join(lines) + "\n"


def _below(figures: Path, out: Path) -> bool:
    return figures.resolve().is_relative_to(out.resolve().parent)


def _recommendations(halves: Sequence[Half]) -> list[str]:
    lines = [
        "| predictor NFE | guidance throughout | error | with the interval | error |",
        "|---|---|---|---|---|",
    ]
    for budget in BUDGETS:
        cells = [str(budget)]
        for half in halves:
            fitting = [m for _, m in half.all() if m.predictor <= budget]
            best = min(fitting, key=lambda m: m.error)
            cells += [f"`{best.name}` ({_nfe(best)})", f"{best.error:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _answers(half: Half) -> list[str]:
    """What the numbers say to the questions that a user has."""
    results = half.results
    parts = [
        ("Does the norm rule help?", _compare(half, "adaptive norm", "H1Pn", "the same blocks in equal steps")),
        ("Does error control (lte) help?", _compare(half, "adaptive lte", "H1Pn", "the same blocks in equal steps")),
        ("Does its mean schedule, frozen, help?", _compare(half, "H1Pn, lte grid", "H1Pn", "a uniform grid")),
        ("Does P help against AB2?", _compare(half, "H1Pn", "AB2", "AB2 with as many evaluations")),
        ("Do published tables help against AB2?", _compare(half, "searched (published)", "AB2", "AB2")),
    ]
    if "searched (this model)" in results:
        parts.append(
            (
                "Does calibrating a table to this model help?",
                _compare(half, "searched (this model)", "searched (published)", "the published tables"),
            )
        )
    if "H1Pn + R3" in results:
        parts.append(
            (
                "Do three R blocks help at equal time?",
                _compare(half, "H1Pn + R3", "AB2", "AB2", _milliseconds),
            )
        )
        parts.append(
            ("Does block choice help at equal time?", _compare(half, "adaptive blocks", "AB2", "AB2", _milliseconds))
        )
        if "searched + R (this model)" in results:
            better = _compare(
                half, "searched + R (this model)", "searched (this model)", "tables without refiner", _milliseconds
            )
            parts.append(("Do refiner evaluations help a searched table?", better))
    spread = _adaptation(half)
    lines = [line for question, answer in parts for line in (f"**{question}** {answer}", "")]
    return [*lines, spread]


def _compare(half: Half, one: str, other: str, against: str, cost: Callable[[Measured], float] = _evaluations) -> str:
    """Ratio of errors of two families at equal cost, interpolated on logarithmic axes, over the range both have."""
    ours, theirs = ([(cost(m), m.error) for m in half.results[name]] for name in (one, other))
    low = max(min(x for x, _ in ours), min(x for x, _ in theirs))
    high = min(max(x for x, _ in ours), max(x for x, _ in theirs))
    unit = "evaluations" if cost is _evaluations else "time"
    if low >= high:
        return f"Not known: *{one}* and *{other}* share no range of {unit}."
    points = np.geomspace(low, high, 9)
    ratios = [_at(ours, x) / _at(theirs, x) for x in points]
    middle = float(np.exp(np.mean(np.log(ratios))))
    verdict = "It helps" if middle < 0.95 else "It hurts" if middle > 1.05 else "It makes no difference"
    return (
        f"{verdict}. At equal {unit}, *{one}* has {middle:.2f} times the error of {against}. This is the geometric "
        f"mean over {_shown(low, cost)} … {_shown(high, cost)}; single points have {min(ratios):.2f} to "
        f"{max(ratios):.2f}."
    )


def _shown(cost: float, of: Callable[[Measured], float]) -> str:
    return f"{cost:.1f} NFE" if of is _evaluations else f"{cost:.1f} ms"


def _at(points: Sequence[tuple[float, float]], x: float) -> float:
    ordered = sorted(points)
    logs = [(math.log(a), math.log(max(b, 1e-12))) for a, b in ordered]
    return math.exp(float(np.interp(math.log(x), [a for a, _ in logs], [b for _, b in logs])))


def _adaptation(half: Half) -> str:
    """How much step lengths of the norm rule differ at all: why it cannot adapt."""
    middle = half.results["adaptive norm"][len(CONSTANTS) // 2]
    lengths = np.array([step.dt for journal in middle.journals for step in journal.accepted[:-2]])
    nfe = [journal.used for journal in middle.journals]
    controlled = half.results["adaptive lte"][TOLERANCES.index(0.01)].journals
    lte = [journal.used for journal in controlled]
    rejected = 100 * float(np.mean([journal.rejected / len(journal.steps) for journal in controlled]))
    fine = half.results["adaptive lte"][-3:]
    slope = np.polyfit(np.log((TOLERANCES[-1], *FINE_TOLERANCES)), np.log([m.error for m in fine]), 1)[0]
    return (
        f"**How much do steps adapt at all?** Under the norm rule ({middle.name}), 95 % of all step lengths lie "
        f"between {np.quantile(lengths, 0.025):.3f} and {np.quantile(lengths, 0.975):.3f}, and images take {min(nfe)} "
        f"to {max(nfe)} evaluations. Under lte at tolerance 0.01 they take {min(lte)} to {max(lte)}, and "
        f"{rejected:.1f} % of the steps are rejected. Below a tolerance of 0.01 the error under lte goes with the "
        f"tolerance to the power {slope:.2f}."
    )


def _nfe(measured: Measured) -> str:
    return f"{measured.predictor:.4g}" + (f" + {measured.refiner:.3g} R" if measured.refiner else "")


def _table(half: Half) -> list[str]:
    lines = [
        "| family | sampler | NFE | error | 90 % of images below | ms | unguided |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, measured in half.all():
        tail = float(np.quantile(measured.errors, 0.9))
        lines.append(
            f"| {family} | `{measured.name}` | {_nfe(measured)} | {measured.error:.4f} | {tail:.4f} | "
            f"{_milliseconds(measured):.1f} | {measured.unguided:g} |"
        )
    return lines


def _numbers(pipeline: Pipeline, images: int, halves: Sequence[Half], command: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "command": command,
        "ran": describe(pipeline),
        "engine": pipeline.manifest.engine_hash,
        "images": images,
        "rules": {name: rule.setting for name, rule in RULES.items()},
        "halves": [
            {
                "guidance": half.guidance.options,
                "samplers": [
                    {
                        "family": family,
                        "name": m.name,
                        "predictor_nfe": m.predictor,
                        "refiner_nfe": m.refiner,
                        "unguided_nfe": m.unguided,
                        "error": m.error,
                        "error_p90": float(np.quantile(m.errors, 0.9)),
                        "ms": _milliseconds(m),
                    }
                    for family, m in half.all()
                ],
            }
            for half in halves
        ],
    }
