"""Reading and writing networks: every known checkpoint format, by the shapes of its tensors, and nothing executable.

Known: the official SiT `.pt`, FlowTurbo's refiner, REPA's SiT (its projector heads are named and dropped), whatever
holds one of them in a dict (`checkpoint_search`), files in shards, and safetensors, which are also what we write.
What the shapes do not tell is assumed, and said in `Network.notes`. `torch.load` is called here only, with
weights-only loading and an allow-list.
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

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowturbo.checkpoint_search import NETWORK_KEYS, StateDict, WeightSet, drop_aliases, find_network, list_tensors
from flowturbo.checkpoint_shards import find_index, list_shards
from flowturbo.evaluation.speed.macs import SIT_SIZES
from flowturbo.models.sit import PATCH_SIZES, SiT, SiTConfig, TimeDirection, find_num_heads
from runtime.system.errors import CheckpointError
from runtime.system.files import write_atomically

Role = Literal["predictor", "refiner"]
Header = Mapping[str, Any]
"""What a file says about itself, as JSON data."""

METADATA_KEY = "flowturbo"
TRAINING_KEY = "flowturbo-training"
"""Metadata of `flowturbo-train`'s own checkpoints, which hold `model.…` and `ema.…`."""
DEFAULT_VAE_FACTOR = 8
"""Pixels per latent of the SD VAEs, assumed where no VAE is named."""

ASSUMED_LATENT_SIZE = 32
"""Latent side of a network whose file holds no positions: that of 256 px with the SD VAEs."""
POSITION_TOLERANCE = 1e-4
"""Positions that are nearer to sin-cos are replaced by these; a file's own precision is added."""

_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,  # official checkpoints keep their arguments beside the weights
    np.dtype,  # and losses or steps as NumPy's numbers
    *(type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)),
    np.float64(0).__reduce__()[0],  # its function, which NumPy 2 has in another module than the files of NumPy 1 say
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]
_MAX_TOKENS = 65_536  # pictures of 4096 px
_READ_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_QUANTISED_NAMES = re.compile(
    r"(^|[._])(qweight|qzeros|scale_weight|weight_scale|scaled_fp8|quant_state|absmax|zero_point|weight_packed)($|[._])"
)
_DROPPED_PREFIXES = ("projectors.",)  # REPA's alignment heads, used in training only


@dataclass(frozen=True)
class Network:
    """A loaded network.

    Attributes:
        model: in float32, evaluation mode, at the latent size it was trained at.
        dropped: names of tensors in the file that the network does not need (REPA's projector heads).
        metadata: what our own files say about themselves: classes, VAE, defaults.
        weights: which of the file's weights these are, in words.
        notes: what was assumed or chosen because the file does not tell, for people.
        has_positions: whether the file tells at which latent size it was trained.
    """

    model: SiT
    dropped: tuple[str, ...] = ()
    metadata: Header = field(default_factory=dict)
    weights: str = ""
    notes: tuple[str, ...] = ()
    has_positions: bool = True


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


_CONVERSION = (
    "python -c \"import torch; c = torch.load('{path}', weights_only=False); "
    "c = c if isinstance(c, dict) else dict(model=c); "
    "c = dict((k, v.state_dict() if hasattr(v, 'state_dict') else v) for k, v in c.items()); "
    "torch.save(dict((k, v if torch.is_tensor(v) else dict((n, w) for n, w in v.items() if torch.is_tensor(w))) "
    "for k, v in c.items() if torch.is_tensor(v) or isinstance(v, dict)), 'weights.pt')\""
)
"""Keeps the tensors of a file whose objects we do not open: of modules, of dicts, and those beside them."""


def load_network(
    path: Path,
    role: Role,
    *,
    weights: WeightSet | None = None,
    heads: int | None = None,
    likely_heads: int | None = None,
    time_direction: TimeDirection | None = None,
    num_classes: int | None = None,
) -> Network:
    """Load a predictor or refiner from any known format; its shape is read off the tensors.

    Args:
        path: file of one of the formats above, an index of shards, or their folder.
        role: what the file must hold.
        weights: which set of a file that holds both; averaged ones ("ema") where it has some and None is asked for.
        heads: attention heads; needed for widths that no released model has and that carry no metadata.
        likely_heads: what to take when neither the width nor the file tells them (for a refiner: its predictor's).
        time_direction: needed for REPA's checkpoints, whose shapes do not tell that their time runs backwards;
            files that hold projector heads are taken as "data-to-noise".
        num_classes: classes of the label table, which may have a row more: the null label of guidance. Where None
            is named, tables of 1 and 1000 rows have no such row, and all others have one.

    Raises:
        CheckpointError: unreadable, not a SiT, not this role, or tensors missing, left over or non-finite.
    """
    content, header = _read_checkpoint(path, weights)
    if "config" in header or "role" in header:
        state = list_tensors(path, content, ())
        weights_text, notes = str(header.get("weights", "the file's weights")), []
    else:
        result = find_network(path, content, weights)
        state, weights_text, notes = result.state, result.weights, list(result.notes)
    dropped = tuple(sorted(key for key in state if key.startswith(_DROPPED_PREFIXES)))
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    config = _resolve_config(path, state, header, heads, likely_heads)
    config = _resolve_classes(path, config, state, num_classes)
    if "config" not in header:
        notes += _list_assumptions(config, state, heads, num_classes)
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
    model = _build_network(path, config, state)
    if not has_sincos_positions(model):
        notes.append("its positions differ from sin-cos: the file's own are used, at their resolution only")
    return Network(model, dropped, header, weights_text, tuple(notes), "pos_embed" in state or "config" in header)


def read_tensors(path: Path) -> StateDict:
    """Return the tensors of a safetensors or torch file by name, whatever network they are of.

    Of a training checkpoint these are the averaged weights.

    Raises:
        CheckpointError: unreadable, or holding objects that could run code.
    """
    return list_tensors(path, _read_checkpoint(path, "ema")[0], ("ema", "model", "state_dict"))


def resize_network(model: SiT, latent_size: int) -> SiT:
    """Return the same weights at another latent side, with new sin-cos positions.

    Raises:
        CheckpointError: the network has positions of its own, which no other side has.
    """
    if latent_size == model.config.latent_size:
        return model
    if not has_sincos_positions(model):
        raise CheckpointError(
            f"a latent side of {latent_size} for a network with positions of its own",
            allowed=f"the side it was trained at, {model.config.latent_size}",
            remedy="leave --resolution out; only sin-cos positions can be computed for another resolution",
        )
    with torch.device("meta"):
        resized_model = SiT(model.config.with_latent_size(latent_size))
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "pos_embed"}
    resized_model.load_state_dict(state, strict=False, assign=True)
    resized_model.pos_embed = SiT.build_positions(resized_model.config)
    return resized_model.eval()


def has_sincos_positions(model: SiT) -> bool:
    """Whether the positions are those that can be computed for every side."""
    expected = SiT.build_positions(model.config)
    return float((model.pos_embed.detach().float().cpu() - expected).abs().max()) <= POSITION_TOLERANCE


def _read_checkpoint(path: Path, weights: WeightSet | None) -> tuple[Any, Header]:
    """Return what a file holds and what it says of itself; of our own training checkpoints the wanted set alone."""
    if (index := find_index(path)) is not None:
        state: StateDict = {}
        for shard, names in list_shards(index).items():
            tensors = list_tensors(shard, _read_checkpoint(shard, weights)[0], ())
            if absent := [name for name in names if name not in tensors]:
                raise CheckpointError(
                    f"{shard} lacks {absent[0]}, which {index.name} says is in it", remedy="download or copy both again"
                )
            state |= {name: tensors[name] for name in names}
        return state, {}
    if not path.is_file():
        folder_hint = ": it is a folder without an index of shards" if path.is_dir() else ""
        raise CheckpointError(
            f"no checkpoint at {path}{folder_hint}",
            allowed="a .pt or .safetensors file, or a folder of shards with their *.index.json",
            remedy="name the file itself" if folder_hint else "check the path",
        )
    try:
        with open(path, "rb") as opened:
            start = opened.read(9)  # safetensors begin with the length of a header, and its bracket
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", remedy="check its permissions") from error
    if len(start) < 9 or start[8:] != b"{" or int.from_bytes(start[:8], "little") > 100_000_000:
        return _read_torch(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if TRAINING_KEY not in metadata:
                header = _parse_header(path, metadata.get(METADATA_KEY, "{}"))
                return {name: file.get_tensor(name) for name in names}, header
            config = _parse_header(path, metadata[TRAINING_KEY]).get("config", {})
            chosen = weights or "ema"
            state = {n.removeprefix(f"{chosen}."): file.get_tensor(n) for n in names if n.startswith(f"{chosen}.")}
            kind = "averaged weights (EMA)" if chosen == "ema" else "weights"
            text = f"{kind} at `{chosen}`"
            return state, {"config": config.get("model"), **config.get("provenance", {}), "weights": text}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is a damaged safetensors file, or is cut short ({path.stat().st_size} bytes): {error}",
            allowed="a safetensors file whose header describes every byte",
            remedy="download or copy it again",
        ) from error


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
            remedy="ask for its tensors alone, as .safetensors or a state dict; or convert it where you trust its "
            f"author: {_CONVERSION.format(path=path)}",
        ) from error
    except Exception as error:  # on bytes that are no pickle at all, the unpickler raises whatever it stumbles on
        raise _build_format_error(path) from error


def _build_format_error(path: Path) -> CheckpointError:
    with open(path, "rb") as file:
        start = file.read(64)
    kinds = {
        b"version https://git-lfs": "a Git LFS pointer, not the file itself",
        b"<!doctype html": "a web page",
        b"<html": "a web page",
        b"gguf": "a quantised GGUF file",
    }
    kind = next((f": it is {text}" for magic, text in kinds.items() if start.lower().startswith(magic)), "")
    return CheckpointError(
        f"{path} is not a checkpoint, or is cut short ({path.stat().st_size} bytes){kind}",
        allowed="a PyTorch .pt file or a .safetensors file",
        remedy="git lfs pull" if "LFS" in kind else "download or copy it again",
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


def _resolve_classes(path: Path, config: SiTConfig, state: StateDict, num_classes: int | None) -> SiTConfig:
    """Return the configuration with the number of classes that was named."""
    table = state.get("y_embedder.embedding_table.weight")
    if num_classes is None or table is None:
        return config
    rows = table.shape[0]
    if num_classes not in (rows, rows - 1) or num_classes < 1:
        raise CheckpointError(
            f"{path}: {num_classes} classes, but its label table has {rows} rows",
            allowed=f"{rows - 1} and a null label, or {rows} and none" if rows > 1 else "1, without a null label",
            remedy="name the number of classes that it was trained on: --num-classes N",
        )
    return replace(config, classes=num_classes, has_null_label=num_classes < rows)


def _list_assumptions(config: SiTConfig, state: StateDict, heads: int | None, num_classes: int | None) -> list[str]:
    """Say what the shapes of a file's tensors do not tell, and what was taken instead."""
    notes = []
    if heads is None:
        size = next((name for name, (_, width, _) in SIT_SIZES.items() if width == config.width), None)
        source = f"as released SiT-{size} of width {config.width}" if size else "as its predictor has"
        notes.append(f"{config.heads} attention heads, {source} (--heads N if it has others)")
    rows = config.classes + config.has_null_label
    if num_classes is None and rows != 1001:
        other = rows if config.has_null_label else rows - 1
        classes = "1 class" if config.classes == 1 else f"{config.classes} classes"
        taken = f"{classes} and {'the null label' if config.has_null_label else 'no null label'}"
        hint = f" (--num-classes {other} if not)" if other else ""
        notes.append(f"its label table has {rows} row{'s' if rows > 1 else ''}: {taken} of guidance are assumed{hint}")
    return notes


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
    missing = [key for key in NETWORK_KEYS if key not in state]
    if missing:
        raise CheckpointError(
            f"{path} is not a SiT: no {', '.join(missing)}; it holds {', '.join(list(state)[:3])}, …",
            allowed="a SiT or FlowTurbo refiner checkpoint in the official key layout",
        )
    for key, dimensions in zip(NETWORK_KEYS, (4, 2, 2, 2), strict=True):
        if state[key].ndim != dimensions or not state[key].numel():
            raise CheckpointError(
                f"{path}: {key} has the shape {list(state[key].shape)}",
                allowed=f"{dimensions} dimensions, as in the official key layout (other networks are not known, and "
                "quantised files are not read)",
            )
    width, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    if patch not in PATCH_SIZES:
        raise CheckpointError(f"{path}: patch size {patch}", allowed=", ".join(map(str, PATCH_SIZES)))
    blocks = {int(number[1]) for key in state if (number := re.match(r"blocks\.(\d{1,6})\.", key))}
    depth = len(blocks)
    if absent := set(range(depth)) - blocks:
        raise CheckpointError(
            f"{path} has the blocks {min(blocks)} to {max(blocks)}, but not all of them; missing: blocks.{min(absent)}",
            allowed="every block from 0 on",
            remedy="save the whole network, or take another checkpoint",
        )
    predicted = state["final_layer.linear.weight"].shape[0] // patch**2
    latent_channels = _infer_latent_channels(path, in_channels, predicted)
    heads = heads or find_num_heads(width) or likely_heads
    if heads is None or width % heads:
        raise CheckpointError(
            f"{path}: the attention heads of a SiT of width {width} cannot be seen in its tensors"
            + (f", and {heads} does not divide it" if heads else ""),
            remedy="name them: --heads N, a divisor of the width",
        )
    tokens = (ASSUMED_LATENT_SIZE // patch) ** 2
    if "pos_embed" in state:
        tokens = state["pos_embed"].shape[1] if state["pos_embed"].ndim == 3 else 0
    side = math.isqrt(tokens)
    if side * side != tokens or not 0 < tokens <= _MAX_TOKENS:
        raise CheckpointError(
            f"{path}: {tokens} positions", allowed="a square number: only square images are supported"
        )
    rows = state["y_embedder.embedding_table.weight"].shape[0]
    has_null_label = rows not in (1, 1000)  # ImageNet's 1000 classes; and no network has no class
    fields: dict[str, Any] = dict(
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        latent_size=side * patch,
        in_channels=in_channels,
        out_channels=latent_channels,
        classes=rows - has_null_label,
        has_null_label=has_null_label,
        learned_sigma=predicted == 2 * latent_channels,
        mlp_width=state["blocks.0.mlp.fc1.weight"].shape[0],
    )
    try:
        return SiTConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a SiT: {error}", allowed="shapes of the official key layout") from error


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
    expected = model.state_dict()
    if empty := [key for key, tensor in state.items() if tensor.is_meta or tensor.layout != torch.strided]:
        raise CheckpointError(
            f"{path}: {empty[0]} is sparse, or has a shape and no numbers",
            allowed="dense tensors with their numbers",
            remedy="save the network's state_dict() from the CPU",
        )
    state = drop_aliases(state, set(expected))
    quantised = [
        f"{key} ({str(tensor.dtype).removeprefix('torch.')})"
        for key, tensor in state.items()
        if (tensor.dtype not in _READ_TYPES if key in expected else _QUANTISED_NAMES.search(key))
    ]
    if quantised:
        raise CheckpointError(
            f"{path} is quantised: {', '.join(quantised[:4])}{' …' if len(quantised) > 4 else ''}",
            allowed="weights in float16, bfloat16, float32, float64, or float8 without scales",
            remedy="take the file it was quantised from; to export in int8, build with --precision int8",
        )
    positions, stored = SiT.build_positions(config), state.get("pos_embed")
    if stored is None:
        state["pos_embed"] = positions
    elif stored.shape == positions.shape:
        tolerance = POSITION_TOLERANCE + (
            0 if stored.dtype in (torch.float32, torch.float64) else torch.finfo(stored.dtype).eps
        )
        if float((stored.detach().float() - positions).abs().max()) <= tolerance:
            state["pos_embed"] = positions
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    mismatched = [key for key in expected if key in state and expected[key].shape != state[key].shape]
    if missing or extra or mismatched:
        problems = [f"{problem}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}" for problem, keys in
                    (("missing", missing), ("unknown", extra), ("of another shape", mismatched)) if keys]  # fmt: skip
        raise CheckpointError(
            f"{path} does not fit a SiT of depth {config.depth}, width {config.width}: {'; '.join(problems)}",
            allowed="exactly the tensors of the official layout (q/k norms and other variants are not known)",
        )
    state = {key: tensor.float() for key, tensor in state.items()}
    non_finite = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if non_finite:
        raise CheckpointError(
            f"{path} holds NaN or infinity in {', '.join(non_finite[:4])}", remedy="take an earlier checkpoint"
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
