"""Training checkpoints: network, average and optimiser state in one safetensors file, written aside and renamed.

Tensors are named `model.…`, `ema.…` and `optimizer.<parameter>:<state>`; the step and the configuration are in the
metadata. No pickle, so a checkpoint from anywhere can be opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowturbo.checkpoints import Network
from flowturbo.models.sit import SiT, SiTConfig
from runtime.system.errors import CheckpointError
from runtime.system.files import replacing

_NAME = re.compile(r"step-(\d{8})\.safetensors")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints of a run, oldest first, as (steps done, file)."""
    found = [
        (int(match[1]), path) for path in folder.glob("step-*.safetensors") if (match := _NAME.fullmatch(path.name))
    ]
    return sorted(found)


def save(
    folder: Path,
    done: int,
    network: nn.Module,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    config: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes the state after `done` steps and removes all but the last `keep` checkpoints."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("model", network), ("ema", ema)):
        tensors.update({f"{prefix}.{key}": value for key, value in module.state_dict().items()})
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors.update({f"optimizer.{names[parameter]}:{key}": value for key, value in state.items()})
    path = folder / f"step-{done:08d}.safetensors"
    with replacing(path) as aside:
        # Views where they can be: a second copy of everything would be the peak of a run's memory.
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(whole, aside, metadata={"flowturbo-training": json.dumps({"step": done, "config": dict(config)})})
    for _, old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def sweep(folder: Path) -> None:
    """Removes half-written files that a killed process left."""
    for aside in folder.glob(".step-*.part"):
        aside.unlink(missing_ok=True)


def load(path: Path, network: nn.Module, ema: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Puts a checkpoint's state back and returns the steps it had done.

    Raises:
        CheckpointError: unreadable, or of a network of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["flowturbo-training"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        network.load_state_dict(_part(tensors, "model."))
        ema.load_state_dict(_part(tensors, "ema."))
        _restore(network, optimizers, _part(tensors, "optimizer."))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot resume from {path}: {str(error).splitlines()[0]}",
            allowed="a checkpoint of this run, trained with the same network options",
            remedy="repeat the options in the run's config.json, or start in another --out",
        ) from error
    return int(meta["step"])


def averaged_network(path: Path) -> Network:
    """The averaged SiT inside a checkpoint of an unfinished run, as `load_network` gives finished ones.

    Raises:
        CheckpointError: unreadable, or not of a SiT or refiner.
    """
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["flowturbo-training"])["config"]
            names = [key for key in file.keys() if key.startswith("ema.")]  # noqa: SIM118 - not a dict
            tensors = {key.removeprefix("ema."): file.get_tensor(key) for key in names}
        model = SiT(SiTConfig.from_json(config["model"]))
        model.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot take a network from {path}: {str(error).splitlines()[0]}",
            allowed="a checkpoint that flowturbo-train sit or refiner wrote",
            remedy="name a step-….safetensors of such a run",
        ) from error
    return Network(model.eval().requires_grad_(False), metadata=config.get("provenance", {}))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _restore(network: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: Mapping[str, Tensor]) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owned_by, _, part = key.rpartition(":")
        states.setdefault(owned_by, {})[part] = value
    adamw = {"step", "exp_avg", "exp_avg_sq"}
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        if name in states:
            if (states[name].keys() >= adamw) != isinstance(owner[parameter], torch.optim.AdamW):
                raise ValueError(f"another --optimizer trained {name}")
            state = {key: value.to(parameter.device, copy=True) for key, value in states[name].items()}
            owner[parameter].state[parameter] = state
