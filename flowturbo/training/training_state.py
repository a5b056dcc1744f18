"""Training checkpoints: network, average and optimiser state in one safetensors file, written aside and renamed.

Tensors are named `model.…`, `ema.…` and `optimizer.<parameter>:<state>`; the step and the configuration are in the
metadata. No pickle, so a checkpoint from anywhere can be opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowturbo.checkpoints import TRAINING_KEY
from runtime.system.errors import CheckpointError
from runtime.system.files import write_atomically

_FILE_NAME = re.compile(r"step-(\d{8})\.safetensors")


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the finished checkpoints of a run, oldest first, as (steps done, file)."""
    entries = [
        (int(match[1]), path)
        for path in folder.glob("step-*.safetensors")
        if (match := _FILE_NAME.fullmatch(path.name))
    ]
    return sorted(entries)


def save_checkpoint(
    folder: Path,
    steps_done: int,
    network: nn.Module,
    ema: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    config: Mapping[str, object],
    keep: int,
) -> Path:
    """Write the state after `steps_done` steps, remove all but the last `keep` checkpoints, and return the file."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("model", network), ("ema", ema)):
        tensors.update({f"{prefix}.{key}": value for key, value in module.state_dict().items()})
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors.update({f"optimizer.{names[parameter]}:{key}": value for key, value in state.items()})
    path = folder / f"step-{steps_done:08d}.safetensors"
    with write_atomically(path) as aside:
        # Views where they can be: a second copy of everything would be the peak of a run's memory.
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(contiguous, aside, metadata={TRAINING_KEY: json.dumps({"step": steps_done, "config": dict(config)})})
    for _, old in list_checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def remove_partial_files(folder: Path) -> None:
    """Remove half-written files that a killed process left."""
    for aside in folder.glob(".step-*.part"):
        aside.unlink(missing_ok=True)


def check_last_checkpoint(folder: Path) -> None:
    """Check that the last checkpoint of a run is whole; a copy or a disk may have cut it.

    Raises:
        CheckpointError: it is damaged. The message names the last one that is whole, and what to do.
    """
    checkpoints = [path for _, path in list_checkpoints(folder)]
    damage = _find_damage(checkpoints[-1])
    if damage is None:
        return
    later: list[Path] = []
    for path in reversed(checkpoints):
        if _find_damage(path) is None:
            damaged_names = ", ".join(damaged.name for damaged in reversed(later))
            raise CheckpointError(
                f"{checkpoints[-1]} is damaged: {damage}; {path.name} before it is whole",
                allowed="a last checkpoint that is whole",
                remedy=f"copy it again, or remove {damaged_names}: --resume then goes on from {path.name}",
            )
        later.append(path)
    raise CheckpointError(
        f"{checkpoints[-1]} is damaged: {damage}; no checkpoint in {folder} is whole",
        allowed="a last checkpoint that is whole",
        remedy="copy it again, or start in another --out",
    )


def _find_damage(path: Path) -> str | None:
    """Return why a checkpoint cannot be read; None if its header is that of a checkpoint and covers the whole file."""
    try:
        with safe_open(path, framework="pt") as file:
            has_step = isinstance(json.loads((file.metadata() or {})[TRAINING_KEY])["step"], int)
    except (OSError, SafetensorError) as error:
        return f"{path.stat().st_size} bytes, {error}" if path.is_file() else str(error)
    except (KeyError, ValueError, TypeError):
        has_step = False
    return None if has_step else f"its metadata {TRAINING_KEY!r} has no step"


def load_checkpoint(path: Path, network: nn.Module, ema: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Put a checkpoint's state back and return the steps it had done.

    Raises:
        CheckpointError: unreadable, or of a network of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})[TRAINING_KEY])
            tensors: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
            for key in file.keys():  # noqa: SIM118 - not a dict
                prefix, _, name = key.partition(".")
                tensors[prefix][name] = file.get_tensor(key)
        network.load_state_dict(tensors["model"])
        ema.load_state_dict(tensors["ema"])
        _restore_optimizers(network, optimizers, tensors["optimizer"])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot resume from {path}: {str(error).splitlines()[0]}",
            allowed="a checkpoint of this run, trained with the same network options",
            remedy="repeat the options in the run's config.json, or start in another --out",
        ) from error
    return int(meta["step"])


def _restore_optimizers(
    network: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        parameter_name, _, state_key = key.rpartition(":")
        states.setdefault(parameter_name, {})[state_key] = value
    adamw = {"step", "exp_avg", "exp_avg_sq"}
    optimizer_by_parameter = {
        p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in network.named_parameters():
        if name in states:
            if (states[name].keys() >= adamw) != isinstance(optimizer_by_parameter[parameter], torch.optim.AdamW):
                raise ValueError(f"another --optimizer trained {name}")
            state = {key: value.to(parameter.device, copy=True) for key, value in states[name].items()}
            optimizer_by_parameter[parameter].state[parameter] = state
