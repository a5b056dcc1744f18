"""Reading and writing networks: every known checkpoint format, by the shapes of its tensors, and nothing executable.

Known: the official SiT `.pt`, FlowTurbo's refiner, training checkpoints with `model` and `ema`, REPA's SiT (its
projector heads are named and dropped), and safetensors, which are also what we write. `torch.load` is called here
only, with weights-only loading and an allow-list.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowturbo.models.sit import PATCH_SIZES, SiT, SiTConfig, TimeDirection, find_num_heads
from runtime.system.errors import CheckpointError
from runtime.system.files import write_atomically

Role = Literal["predictor", "refiner"]
StateDict = dict[str, Tensor]
WeightSet = Literal["ema", "model"]
Header = Mapping[str, Any]
"""What a file says about itself, as JSON data."""

METADATA_KEY = "flowturbo"
TRAINING_KEY = "flowturbo-training"
"""Metadata of `flowturbo-train`'s own checkpoints, which hold `model.…` and `ema.…`."""
DEFAULT_VAE_FACTOR = 8
"""Pixels per latent of the SD VAEs, assumed where no VAE is named."""

_ALLOWED_GLOBALS: list[Any] = [argparse.Namespace]  # official checkpoints keep their arguments beside the weights
_DROPPED_PREFIXES = ("projectors.",)  # REPA's alignment heads, used in training only


@dataclass(frozen=True)
class Network:
    """A loaded network.

    Attributes:
        model: in float32, evaluation mode, at the latent size it was trained at.
        dropped: names of tensors in the file that the network does not need (REPA's projector heads).
        metadata: what our own files say about themselves: classes, VAE, defaults.
    """

    model: SiT
    dropped: tuple[str, ...] = ()
    metadata: Header = field(default_factory=dict)


def save_network(path: Path, model: SiT, *, role: Role, extra: Mapping[str, object] | None = None) -> None:
    """Write weights in the official key layout with the configuration in the metadata, whole or not at all.

    Args:
        extra: JSON data for whoever loads it: `classes` (index → name), `vae`, `guidance`, `schedule`.
    """
    save_weights(path, model, {"role": role, "config": model.config.to_json(), **(extra or {})})


def save_weights(path: Path, model: nn.Module, header: Mapping[str, object]) -> None:
    """Write a module's tensors with JSON data about it in the metadata, whole or not at all."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with write_atomically(path) as aside:
        save_file(state, aside, metadata={METADATA_KEY: json.dumps(dict(header))})
        aside.chmod(0o644)  # safetensors makes files that only their owner can read


def load_network(
    path: Path,
    role: Role,
    *,
    weights: WeightSet = "ema",
    heads: int | None = None,
    likely_heads: int | None = None,
    time_direction: TimeDirection | None = None,
) -> Network:
    """Load a predictor or refiner from any known format; its shape is read off the tensors.

    Args:
        path: file of one of the formats above.
        role: what the file must hold.
        weights: which set of a training checkpoint that holds both.
        heads: attention heads; needed for widths that no released model has and that carry no metadata.
        likely_heads: what to take when neither the width nor the file tells them (for a refiner: its predictor's).
        time_direction: needed for REPA's checkpoints, whose shapes do not tell that their time runs backwards;
            files that hold projector heads are taken as "data-to-noise".

    Raises:
        CheckpointError: unreadable, not a SiT, not this role, or tensors missing, left over or non-finite.
    """
    state, header = _read_checkpoint(path, weights)
    dropped = tuple(sorted(key for key in state if key.startswith(_DROPPED_PREFIXES)))
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    config = _resolve_config(path, state, header, heads, likely_heads)
    if time_direction is None and "config" not in header and dropped:
        time_direction = "data-to-noise"
    if time_direction is not None:
        config = replace(config, time_direction=time_direction)
    actual_role = "refiner" if config.is_refiner else "predictor"
    if actual_role != role:
        raise CheckpointError(
            f"{path} is a {actual_role} (it reads {config.in_channels} channels), but was named as the {role}",
            remedy=f"name a {role} here; this file goes where a {actual_role} is asked for",
        )
    return Network(_build_network(path, config, state), dropped, header)


def read_tensors(path: Path) -> StateDict:
    """Return the tensors of a safetensors or torch file by name, whatever network they are of.

    Of a training checkpoint these are the averaged weights.

    Raises:
        CheckpointError: unreadable, or holding objects that could run code.
    """
    return _read_checkpoint(path, "ema")[0]


def resize_network(model: SiT, latent_size: int) -> SiT:
    """Return the same weights at another latent side, with new sin-cos positions."""
    if latent_size == model.config.latent_size:
        return model
    with torch.device("meta"):
        resized_model = SiT(model.config.with_latent_size(latent_size))
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "pos_embed"}
    resized_model.load_state_dict(state, strict=False, assign=True)
    resized_model.pos_embed = SiT.build_positions(resized_model.config)
    return resized_model.eval()


def _read_checkpoint(path: Path, weights: WeightSet) -> tuple[StateDict, Header]:
    """Return the weights and what the file says of itself; of a training checkpoint the wanted set."""
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}", remedy="check the path; it must be a .pt or .safetensors file"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if TRAINING_KEY not in metadata:
                header = _parse_header(path, metadata.get(METADATA_KEY, "{}"))
                return {name: file.get_tensor(name) for name in names}, header
            config = _parse_header(path, metadata[TRAINING_KEY]).get("config", {})
            prefix = f"{weights}."
            state = {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}
            return state, {"config": config.get("model"), **config.get("provenance", {})}
    except SafetensorError:
        content = _read_torch(path)  # a torch file, or neither, which this reader says
    if isinstance(content, Mapping):
        order = (weights, "ema", "model", "state_dict")
        content = next((content[key] for key in order if isinstance(content.get(key), Mapping)), content)
        state = {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
        if state:
            return state, {}
    raise CheckpointError(f"{path} holds no tensors", allowed="a state dict, or a dict with `ema` or `model`")


def _parse_header(path: Path, text: str) -> Header:
    with suppress(ValueError):
        header = json.loads(text)
        if isinstance(header, dict):
            return header
    raise CheckpointError(
        f"{path}: its metadata {METADATA_KEY!r} is damaged",
        allowed="a JSON object",
        remedy="copy or write the file again",
    )


def _read_torch(path: Path) -> Any:
    """Open a pickle, weights only and with the allow-list: nothing else in this project does."""
    try:
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden is None:
            raise _build_format_error(path) from error
        raise CheckpointError(
            f"{path} holds Python objects ({forbidden.group(1)}) that could run code, so it is not opened",
            allowed="tensors, numbers, strings and argparse.Namespace",
            remedy="where you trust it: python -c \"import torch; c = torch.load('"
            f"{path}', weights_only=False); torch.save(c.get('ema', c.get('model', c)), 'weights.pt')\"",
        ) from error
    except Exception as error:  # on bytes that are no pickle at all, the unpickler raises whatever it stumbles on
        raise _build_format_error(path) from error


def _build_format_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a checkpoint, or is cut short ({path.stat().st_size} bytes)",
        allowed="a PyTorch .pt file or a .safetensors file",
        remedy="download or copy it again",
    )


def _resolve_config(
    path: Path, state: StateDict, header: Header, heads: int | None, likely_heads: int | None
) -> SiTConfig:
    if "config" not in header:
        return infer_config(path, state, heads, likely_heads)
    if header.get("role") == "vae":
        raise CheckpointError(f"{path} is a VAE, no SiT", remedy="name its folder in diffusers layout with --vae")
    try:
        config = SiTConfig.from_json(header["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its metadata is not a SiT configuration ({error})", remedy="copy or write the file again"
        ) from error
    if heads is not None and config.width % heads:
        raise CheckpointError(
            f"{path}: {heads} heads do not divide its width {config.width}",
            allowed=f"{config.heads}, as the file itself says",
            remedy="leave --heads out",
        )
    return config if heads is None else replace(config, heads=heads)


def infer_config(
    path: Path, state: Mapping[str, Tensor], heads: int | None = None, likely_heads: int | None = None
) -> SiTConfig:
    """Read a SiT's configuration off the shapes of its tensors.

    Args:
        path: file of the tensors, for messages.
        state: the tensors by name.
        heads: attention heads, if they are known.
        likely_heads: what to take when the width does not tell them.

    Raises:
        CheckpointError: the tensors are not a SiT's, or the number of heads cannot be known.
    """
    needed = (
        "x_embedder.proj.weight",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
        "blocks.0.mlp.fc1.weight",
    )
    missing = [key for key in needed if key not in state]
    if missing:
        raise CheckpointError(
            f"{path} is not a SiT: no {', '.join(missing)}; it holds {', '.join(list(state)[:3])}, …",
            allowed="a SiT or FlowTurbo refiner checkpoint in the official key layout",
        )
    width, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    if patch not in PATCH_SIZES:
        raise CheckpointError(f"{path}: patch size {patch}", allowed=", ".join(map(str, PATCH_SIZES)))
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    predicted = state["final_layer.linear.weight"].shape[0] // patch**2
    latent_channels = _infer_latent_channels(path, in_channels, predicted)
    heads = heads or find_num_heads(width) or likely_heads
    if heads is None or width % heads:
        raise CheckpointError(
            f"{path}: the attention heads of a SiT of width {width} cannot be seen in its tensors"
            + (f", and {heads} does not divide it" if heads else ""),
            remedy="name them: --heads N, a divisor of the width",
        )
    tokens = state["pos_embed"].shape[1] if "pos_embed" in state else (32 // patch) ** 2
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(
            f"{path}: {tokens} positions", allowed="a square number: only square images are supported"
        )
    return SiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        latent_size=side * patch,
        in_channels=in_channels,
        out_channels=latent_channels,
        classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        learned_sigma=predicted == 2 * latent_channels,
        mlp_width=state["blocks.0.mlp.fc1.weight"].shape[0],
    )


def _infer_latent_channels(path: Path, in_channels: int, predicted: int) -> int:
    """Return C of a network that reads C or 2C channels and predicts C or 2C: only one C fits."""
    for channels, known_in_channels in ((4, 4), (4, 8), (16, 16), (16, 32)):
        if in_channels == known_in_channels and predicted in (channels, 2 * channels):
            return channels
    if predicted in (in_channels, 2 * in_channels):
        return in_channels
    raise CheckpointError(
        f"{path}: reads {in_channels} channels and predicts {predicted}",
        allowed="a predictor reads C and predicts C or 2C, a refiner reads 2C; C = 4 for SD VAEs",
    )


def _build_network(path: Path, config: SiTConfig, state: StateDict) -> SiT:
    with torch.device("meta"):
        model = SiT(config)
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    state["pos_embed"] = SiT.build_positions(config)
    expected = model.state_dict()
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    mismatched = [key for key in expected if key in state and expected[key].shape != state[key].shape]
    if missing or extra or mismatched:
        problems = [f"{problem}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}" for problem, keys in
                    (("missing", missing), ("unknown", extra), ("of another shape", mismatched)) if keys]  # fmt: skip
        raise CheckpointError(
            f"{path} does not fit a SiT of depth {config.depth}, width {config.width}: {'; '.join(problems)}",
            allowed="exactly the tensors of the official layout (q/k norms and other variants are not known)",
        )
    non_finite = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if non_finite:
        raise CheckpointError(
            f"{path} holds NaN or infinity in {', '.join(non_finite[:4])}", remedy="take an earlier checkpoint"
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
