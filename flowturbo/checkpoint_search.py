"""Find a network in what a checkpoint holds, whatever lies around it: containers, prefixes, several sets of weights.

A file is a tree of dicts and lists. A network is where all of its key tensors lie in one dict under one prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from runtime.system.errors import CheckpointError

StateDict = dict[str, Tensor]
WeightSet = Literal["ema", "model"]

NETWORK_KEYS = (
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
    "blocks.0.mlp.fc1.weight",
)
"""Tensors that every SiT has and nothing else."""

_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_ddp_module")
)
"""Parts of names that data parallelism and compilation put anywhere into them."""
_AVERAGE_WORDS = re.compile(r"(^|[._-])(ema\d*|averaged?|avg|swa|shadow)($|[._-])", re.IGNORECASE)
_USUAL_NAMES = (
    *("ema", "ema_model", "model_ema", "ema_state_dict", "net_ema", "ema_net", "params_ema"),
    *("", "model", "state_dict", "state_dict.model", "model_state_dict", "net", "state_dict.net", "params", "module"),
)
"""Where a network lies in most files: the first of these is taken where several have one."""
_COUNTERS = frozenset(("n_averaged",))
"""What AveragedModel keeps beside the network."""
_MAX_DEPTH = 8
_MAX_CONTAINERS = 20_000
_LISTED = 6


@dataclass(frozen=True)
class FoundWeights:
    """One set of weights of a file.

    Attributes:
        place: where it lies, such as "ema" or "state_dict.net"; empty where it is the whole file.
        is_averaged: whether the names around it say that it is an average.
        state: its tensors, by the names that the network gives them.
    """

    place: str
    is_averaged: bool
    state: StateDict


@dataclass(frozen=True)
class SearchResult:
    """What was found and taken.

    Attributes:
        state: the tensors that were taken.
        weights: which set that is, in words.
        notes: what a reader should know about the choice.
    """

    state: StateDict
    weights: str
    notes: tuple[str, ...] = ()


def find_network(path: Path, content: Any, weights: WeightSet | None) -> SearchResult:
    """Return the tensors of the SiT in a file, the averaged ones where it has both and neither is asked for.

    Raises:
        CheckpointError: no SiT in it, not the wanted set, or several that nothing tells apart.
    """
    tables = dict(_list_tables(content)) if isinstance(content, Mapping | list | tuple) else {}
    if not tables:
        raise CheckpointError(f"{path} holds no tensors", allowed="a state dict, or a dict that holds one")
    if adapters := [name for table in tables.values() for name in table if re.search(r"(^|[._])lora_", name)]:
        raise CheckpointError(
            f"{path} holds LoRA adapters ({adapters[0]} …)",
            allowed="the weights of a whole network",
            remedy="merge the adapters into the network (peft: merge_and_unload), then save its state_dict()",
        )
    found = [weight_set for place, table in tables.items() for weight_set in _find_sets(place, table)]
    if not found:
        raise _make_missing_error(path, tables)
    wanted = [s for s in found if weights is None or s.is_averaged == (weights == "ema")]
    if not wanted and weights is not None and len(found) == 1:
        last_name = found[0].place.split(".")[-1]
        if not found[0].is_averaged and last_name not in ("model", "net", "params", "model_state_dict"):
            wanted = found  # the file does not say which they are, and has no others
    if not wanted:
        places = ", ".join(_describe_place(s) for s in found)
        raise CheckpointError(
            f"{path} has no {'averaged' if weights == 'ema' else 'unaveraged'} weights; its weights: {places}",
            remedy=f"--weights {'model' if weights == 'ema' else 'ema'}, or leave --weights out",
        )
    averaged = [s for s in wanted if s.is_averaged]
    chosen, *others = sorted(averaged or wanted, key=_compute_rank)
    if others and _compute_rank(chosen) == _compute_rank(others[0]):
        state, other = chosen.state, others[0].state
        are_equal = state.keys() == other.keys() and all(
            bool(state[k].shape == other[k].shape) and bool((state[k] == other[k]).all()) for k in state
        )
        if not are_equal:
            raise CheckpointError(
                f"{path} holds several networks: {', '.join(_describe_place(s) for s in (chosen, *others))}",
                remedy="save the state_dict() of the wanted one in a file of its own",
            )
    notes = []
    if rest := [s for s in found if s is not chosen]:
        notes.append(f"the file also holds {', '.join(_describe_place(s) for s in rest)}, which were not taken")
    unread = [
        f"`{key}`"
        for key, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, Mapping | list | tuple) and _AVERAGE_WORDS.search(_split_words(str(key)))
    ]  # their names speak of averages, and none of them held the network
    if not chosen.is_averaged and weights != "model" and unread:
        notes.append(f"the file's {', '.join(unread)} hold no network that can be read: these are unaveraged weights")
    return SearchResult(chosen.state, _describe_place(chosen), tuple(notes))


def list_tensors(path: Path, content: Any, order: Sequence[str]) -> StateDict:
    """Return the tensors of any network: those under the first key of `order` that has some, or of the whole dict.

    Raises:
        CheckpointError: there are none.
    """
    if isinstance(content, Mapping):
        for table in (*(content.get(key) for key in order), content):
            if isinstance(table, Mapping):
                tensors = {str(key): value for key, value in table.items() if isinstance(value, Tensor)}
                if tensors:
                    return strip_wrappers(tensors)
    raise CheckpointError(f"{path} holds no tensors", allowed="a state dict, or a dict with `ema` or `model`")


def strip_wrappers(table: Mapping[str, Tensor]) -> StateDict:
    """Return tensors under their names without what data parallelism and compilation put into them."""
    names = {name: ".".join(p for p in name.split(".") if p not in _WRAPPERS) or name for name in table}
    if len(set(names.values())) < len(names):  # two networks that only a wrapper tells apart
        return dict(table)
    return {names[name]: tensor for name, tensor in table.items()}


def drop_aliases(state: Mapping[str, Tensor], known: set[str]) -> StateDict:
    """Return the tensors without unknown names for the memory of known ones."""
    memory = {(state[name].data_ptr(), state[name].shape) for name in known & set(state) if state[name].numel()}
    return {n: t for n, t in state.items() if n in known or (t.data_ptr(), t.shape) not in memory}


def _list_tables(content: Any) -> Iterator[tuple[str, StateDict]]:
    """Yield every dict in a tree that holds tensors, with the keys that lead to it."""
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    for _ in range(_MAX_CONTAINERS):  # a hostile file may refer to one container very often, or to itself
        if not waiting:
            return
        place, container, depth = waiting.pop(0)
        children = list(container.items() if isinstance(container, Mapping) else enumerate(container))
        if isinstance(container, Mapping):
            tensors = {str(key): value for key, value in children if isinstance(value, Tensor)}
            if tensors:
                yield place, tensors
        if depth < _MAX_DEPTH:
            waiting += [
                (f"{place}.{key}" if place else str(key), value, depth + 1)
                for key, value in children
                if isinstance(value, Mapping | list | tuple)
            ]


def _find_sets(place: str, table: StateDict) -> list[FoundWeights]:
    """Return the networks among the tensors of one dict, one for every prefix under which all key tensors lie."""
    names = strip_wrappers(table)
    first = NETWORK_KEYS[0]
    prefixes = [n.removesuffix(first) for n in names if n == first or n.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(prefix + key in names for key in NETWORK_KEYS)]
    found = []
    for prefix in prefixes:
        inner = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in names.items()
            if name.startswith(prefix) and not (inner and name.startswith(inner))
        }
        counters = [name for name in _COUNTERS if name in state or name in names]
        state = {name: tensor for name, tensor in state.items() if name not in _COUNTERS}
        full_place = ".".join(part for part in (place, prefix.removesuffix(".")) if part)
        found.append(FoundWeights(full_place, bool(counters or _AVERAGE_WORDS.search(_split_words(full_place))), state))
    return found


def _split_words(place: str) -> str:
    return place.replace("_", ".")


def _compute_rank(found: FoundWeights) -> tuple[int, str]:
    """Order of preference; other averages by name, so that the choice does not depend on the file's order."""
    place = found.place
    if place in _USUAL_NAMES:
        return _USUAL_NAMES.index(place), ""
    return len(_USUAL_NAMES), place if found.is_averaged else ""


def _describe_place(found: FoundWeights) -> str:
    kind = "averaged weights (EMA)" if found.is_averaged else "weights"
    return f"{kind} at `{found.place}`" if found.place else f"the file's {kind}"


def _make_missing_error(path: Path, tables: Mapping[str, StateDict]) -> CheckpointError:
    """Say what is missing from the dict that comes nearest, and what the file holds."""

    def count_keys(table: StateDict) -> int:
        return sum(any(name.endswith(key) for name in table) for key in NETWORK_KEYS)

    nearest = max(tables, key=lambda place: count_keys(tables[place]))
    missing = [key for key in NETWORK_KEYS if not any(name.endswith(key) for name in tables[nearest])]
    if any("_flat_param" in name for name in tables[nearest]):
        return CheckpointError(
            f"{path} is a shard of FSDP: its tensors are flat pieces",
            allowed="a full state dict",
            remedy="save it with FSDP's StateDictType.FULL_STATE_DICT, which merges the shards",
        )
    listed = []
    for place, table in tables.items():
        names = ", ".join([*list(table)[:3], *(["…"] if len(table) > 3 else [])])
        listed.append(f"{f'`{place}`' if place else 'the file itself'} ({len(table)}): {names}")
    more = f"; and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    reason = f"no {', '.join(missing)}" if missing else "its tensors lie under different prefixes"
    return CheckpointError(
        f"{path} is not a SiT: {reason}; it holds tensors in {'; in '.join(listed[:_LISTED])}{more}",
        allowed="a SiT or FlowTurbo refiner in the official key layout, in any dict of the file, under any one prefix",
        remedy="name another file, or save the network's state_dict() in one",
    )
