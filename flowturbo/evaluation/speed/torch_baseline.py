"""Run what `flowturbo-bench --baseline torch` measures: the checkpoints in PyTorch, by the plan of the engines.

`baselines.py` imports it when a torch baseline is asked for, so that the benchmark itself needs no torch.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowturbo import demo
from flowturbo.checkpoint_search import WeightSet
from flowturbo.checkpoint_shards import find_index, hash_checkpoint
from flowturbo.checkpoints import Role, load_network, resize_network
from flowturbo.evaluation.speed.baselines import BaselineOptions, StageCallTimes
from flowturbo.evaluation.speed.timed_pipeline import CUDA_EVENTS, MONOTONIC
from flowturbo.flow import VelocityNetwork
from flowturbo.models.sit import SiT
from flowturbo.models.vae import Vae, load_vae
from flowturbo.torch_sampler import sample
from runtime.images import convert_to_uint8
from runtime.request import Request
from runtime.sampling.noise import NoiseStream
from runtime.system.errors import BackendError, CheckpointError, RequestError
from runtime.system.hardware import count_physical_cores
from runtime.system.hashes import sha256_cached

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MAX_COMPILED_SHAPES = 64
"""Shapes that torch.compile may compile for before it gives up and, with one log line, runs eagerly."""


@dataclass(frozen=True)
class TorchMode:
    """How PyTorch runs the networks."""

    precision: str
    is_compiled: bool


TORCH_MODES = {
    "eager": TorchMode("fp32", is_compiled=False),
    "eager-bf16": TorchMode("bf16", is_compiled=False),
    "compile": TorchMode("fp32", is_compiled=True),
    "compile-bf16": TorchMode("bf16", is_compiled=True),
}


class TorchBaselines:
    """The plug-in."""

    modes = tuple(TORCH_MODES)

    def open(self, modes: Sequence[str], options: BaselineOptions) -> list[TorchBaseline]:
        """Load the checkpoints once, in each precision that is asked for.

        Raises:
            CheckpointError: they are missing, or not those that the engines were built from.
            BackendError: the engines run on a GPU that this torch cannot use.
        """
        if options.cuda and not torch.cuda.is_available():
            raise BackendError(
                f"the engines run on a GPU, and this torch {torch.__version__} has none: not like for like",
                remedy="install a CUDA build of torch, or benchmark with --backend onnxruntime --provider cpu",
            )
        torch.set_num_threads(options.threads or count_physical_cores())
        torch._dynamo.config.recompile_limit = _MAX_COMPILED_SHAPES
        # fp32 is fp32 here, as it is in the engines: cuDNN would round its inputs to TF32 by itself.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        weights = BaselineCheckpoints(options)
        return [TorchBaseline(f"torch:{name}", TORCH_MODES[name], weights) for name in modes]

    def measure_matrix_products(self) -> Mapping[str, float]:
        """Return the FLOP/s of a large product on the CPU in fp32 and bf16, the best of a few."""
        torch.set_num_threads(count_physical_cores())
        return {precision: _measure_product_flops(dtype) for precision, dtype in _DTYPES.items()}


PLUGIN = TorchBaselines()


class BaselineCheckpoints:
    """The checkpoints of an engine directory, by precision; baselines of one precision share them."""

    def __init__(self, options: BaselineOptions) -> None:
        self.manifest, self._options = options.manifest, options
        self.device = torch.device("cuda" if options.cuda else "cpu")
        self.side = options.manifest.compute_side(options.resolution)
        self._networks: dict[Role, SiT] = {"predictor": self._load_role("predictor", options.manifest.model.predictor)}
        if options.manifest.model.refiner is not None:
            self._networks["refiner"] = self._load_role("refiner", options.manifest.model.refiner)
        self._cast: dict[tuple[str, str], Any] = {}

    @property
    def roles(self) -> tuple[Role, ...]:
        """Networks of the engine directory."""
        return tuple(self._networks)

    def get_network(self, role: Role, precision: str) -> SiT:
        """Return the predictor or refiner in a precision."""
        model = self._networks[role]
        return self._cast_once(role, precision, lambda dtype: copy.deepcopy(model).to(self.device, dtype))  # type: ignore[no-any-return]

    def get_vae(self, variant: str, precision: str) -> Vae:
        """Return a decoder in a precision."""

        def load_cast(dtype: torch.dtype) -> Vae:
            full_vae = load_vae(self._find_vae_source(variant))
            return replace(full_vae, module=full_vae.module.to(self.device, dtype))

        return self._cast_once(variant, precision, load_cast)  # type: ignore[no-any-return]

    def _cast_once(self, name: str, precision: str, cast: Callable[[torch.dtype], Any]) -> Any:
        if (name, precision) not in self._cast:
            self._cast[name, precision] = cast(_DTYPES[precision])
        return self._cast[name, precision]

    def _load_role(self, role: Role, config: Mapping[str, Any]) -> SiT:
        path = self._options.checkpoints.get(role) or {"predictor": demo.PREDICTOR, "refiner": demo.REFINER}[role]
        if not path.is_file() and find_index(path) is None:
            raise CheckpointError(f"no {role} checkpoint at {path}", remedy=f"--checkpoint {role}=FILE")
        if hash_checkpoint(path) != self.manifest.model.sources[role]:
            raise self._make_checkpoint_error(role, path)
        inputs = self.manifest.inputs
        model = load_network(
            path,
            role,
            weights=cast(WeightSet | None, inputs.get("weights")),
            heads=config["heads"],
            time_direction=config["time_direction"],
            num_classes=int(inputs["num classes"]) if "num classes" in inputs else None,
        ).model
        return resize_network(model, self.side)

    def _find_vae_source(self, variant: str) -> str:
        """Return the folder that a decoder was built from, or its name on the hub."""
        sources = self.manifest.model.sources
        recorded = sources.get(f"vae {variant}", "")
        folder = self._options.checkpoints.get("vae") or demo.VAES.get(variant)
        if folder is not None and folder.is_dir():
            file_hashes = [sha256_cached(path) for path in sorted(folder.iterdir()) if path.is_file()]
            if recorded.split() == file_hashes:
                return str(folder)
        name = recorded.partition(" ")[0]
        if self._options.checkpoints.get("vae") is None and name and not re.fullmatch("[0-9a-f]{64}", name):
            return name
        raise self._make_checkpoint_error(f"vae {variant}", folder)

    def _make_checkpoint_error(self, role: str, path: Path | None) -> CheckpointError:
        option = role.split()[0]
        is_named = option in self._options.checkpoints
        return CheckpointError(
            f"{path} is not the {role} that the engines were built from"
            if is_named
            else f"the engines were not built from the demo's {role}, and no other is named",
            allowed=f"the one whose sha256 is {self.manifest.model.sources.get(role, 'in the manifest')[:16]}…",
            remedy=f"--checkpoint {option}={'DIR' if option == 'vae' else 'FILE'}",
        )


class TorchBaseline:
    """One mode of PyTorch; a `flowturbo.evaluation.speed.baselines.Baseline`."""

    def __init__(self, name: str, mode: TorchMode, weights: BaselineCheckpoints) -> None:
        self.name, self.precision = name, mode.precision
        device = f"cpu, {torch.get_num_threads()} threads" if weights.device.type == "cpu" else "cuda"
        self.runner = f"torch {torch.__version__} {'compiled' if mode.is_compiled else 'eager'} ({device})"
        self.clock_name = MONOTONIC if weights.device.type == "cpu" else CUDA_EVENTS
        self._weights, self._mode = weights, mode
        self._networks: dict[str, VelocityNetwork] = {role: self._make_network_call(role) for role in weights.roles}
        self._decoders: dict[str, Callable[[Tensor], Tensor]] = {}

    @torch.inference_mode()
    def run(self, request: Request, calls: StageCallTimes) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """Return latents and pictures of a request; `calls` takes the milliseconds of every network call.

        Raises:
            RequestError: the sampler chooses its steps.
        """
        plan, model = request.sampler.plan, self._weights.manifest.model
        if request.sampler.adaptive_solver is not None:
            raise RequestError(
                f"--baseline with {request.sampler.name}, whose steps depend on what it sees",
                allowed="fixed samplers: schedules, and solvers with steps",
            )
        shape = (model.channels, self._weights.side, self._weights.side)
        stream, timer = NoiseStream(request.seeds, shape), _StageTimer(self._weights.device)
        latents = sample(
            self._networks,
            plan,
            request.conditions,
            torch.from_numpy(stream.initial).to(self._weights.device),
            guided_channels=request.guidance_channels,
            draws=[torch.from_numpy(stream.draw(k)).to(self._weights.device) for k in range(request.sampler.num_draws)],
            hook=lambda evaluation: timer.time_call(evaluation.network),
        )
        pixels = None if request.vae is None else self._decode(latents, request.vae, timer)
        pictures = None if pixels is None else convert_to_uint8(pixels.cpu().numpy())
        latents_out: NDArray[np.float32] = latents.cpu().numpy()
        timer.add_times(calls)
        return latents_out, pictures

    def _decode(self, latents: Tensor, variant: str, timer: _StageTimer) -> Tensor:
        if variant not in self._decoders:
            decode = self._weights.get_vae(variant, self.precision).decode
            self._decoders[variant] = torch.compile(decode, dynamic=False) if self._mode.is_compiled else decode
        with timer.time_call("decoder"):
            return self._decoders[variant](latents.to(_DTYPES[self.precision]))

    def _make_network_call(self, role: Role) -> VelocityNetwork:
        model, dtype = self._weights.get_network(role, self.precision), _DTYPES[self.precision]
        forward: Any = torch.compile(model, dynamic=False) if self._mode.is_compiled else model

        def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            out: Tensor = forward(x.to(dtype), t, y)
            return out.float()

        return call


class _StageTimer:
    """Time calls: by CUDA events on a GPU, where calls return early, else by the monotonic clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._calls: list[tuple[str, Any, Any]] = []

    @contextmanager
    def time_call(self, stage: str) -> Iterator[None]:
        started = self._now()
        yield
        self._calls.append((stage, started, self._now()))

    def add_times(self, calls: StageCallTimes) -> None:
        """Add the times so far; the device must have finished."""
        for stage, started, ended in self._calls:
            calls[stage].append(started.elapsed_time(ended) if self._cuda else (ended - started) / 1e6)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _measure_product_flops(
    dtype: torch.dtype, largest: int = 2048, repeats: int = 4, slow_seconds: float = 0.2
) -> float:
    """Return FLOP/s. Matrices grow until a product takes `slow_seconds`: bf16 is slow without its instructions."""

    def time_product(side: int) -> float:
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        started = time.perf_counter()
        torch.mm(a, b)
        return time.perf_counter() - started

    side, best_flops = min(256, largest), 0.0
    while True:
        seconds = min(time_product(side) for _ in range(repeats))
        best_flops = max(best_flops, 2 * side**3 / seconds)
        if side >= largest or seconds > slow_seconds / 8:  # twice the side is eight times the work
            return best_flops
        side = min(2 * side, largest)
