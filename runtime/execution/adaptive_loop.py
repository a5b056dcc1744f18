"""The deployed loop of samplers that look at what they get: every image takes its own steps, batches stay together.

Each image is steered by its own generator (`plan.Steps`). In every round the images that ask the same network for the
same kind of rows share one engine call; those that are done leave the batch and cost nothing. Only two numbers an
image, its error and the size of its velocity, come to the host; latents move between batches on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Buffer
from runtime.execution.conditioning import pair_of
from runtime.execution.fixed_loop import (
    Floats,
    Loop,
    Usage,
    broken_network,
    evaluation_inputs,
    evaluation_outputs,
    fill_coefficients,
)
from runtime.execution.workspace import Workspace
from runtime.sampling.guidance import Rows
from runtime.sampling.history import Held, free_slot
from runtime.sampling.plan import HISTORY, Callback, Combination, Evaluation, Feedback, Steps, combine

RowsFor = Callable[[Sequence[int], bool], Rows]
"""The rows of an evaluation of some images of the batch, with guidance or without."""


@dataclass
class Actor:
    """A generator and the images that it steers: one, or several that share every decision.

    Attributes:
        images: their places in the batch.
        evaluation: what it asks for next; None when it is done.
        made: evaluations so far; the next one's name.
        held: slots of the slopes that it may still read.
    """

    steps: Steps
    images: tuple[int, ...]
    evaluation: Evaluation | None = None
    end: Combination | None = None
    made: int = 0
    held: Held = field(default_factory=dict)
    group: _Group | None = None

    def start(self) -> None:
        self._go_on(None)

    def tell(self, feedback: Feedback) -> None:
        """Sends what came of the evaluation and takes the next one."""
        self.made += 1
        self._go_on(feedback)

    def _go_on(self, feedback: Feedback | None) -> None:
        try:
            self.evaluation = next(self.steps) if feedback is None else self.steps.send(feedback)
        except StopIteration as stop:
            self.evaluation, self.end = None, stop.value
            return
        lost = self.evaluation.reads() - self.held.keys()
        assert not lost, f"evaluation {self.made} reads {lost}, which an evaluation since has not read"
        self.held = {name: slot for name, slot in self.held.items() if name in self.evaluation.reads()}


class _Group:
    """Images that are evaluated together, and their memory."""

    def __init__(self, backend: Backend, space: Workspace, actors: Sequence[Actor], rows: Rows) -> None:
        self.space, self.rows, self.last = space, rows, -1
        self.actors = tuple(actors)
        images = [image for actor in actors for image in actor.images]
        self.places = {image: place for place, image in enumerate(images)}
        self.staying = len(actors)
        count = space.images  # more than its own where a fixed batch is filled up
        self._coefficients = {
            name: (np.zeros((size, count), np.float32), backend.buffer((size, count), np.float32))
            for name, size in (("a", HISTORY + 1), ("b", HISTORY + 2), ("e", HISTORY + 1))
        }
        self.norms = {name: backend.buffer((count,), np.float32) for name in ("err", "v_rms")}

    def rows_at(self, image: int) -> list[int]:
        """Rows of one image, the conditional ones first."""
        return [int(row) for row in np.flatnonzero(self.rows.pair == self.places[image])]

    def coefficients(self) -> dict[str, Buffer]:
        """The contract's a, b and e for what every actor asks now; the tolerances go into the workspace."""
        scales = np.zeros((2, self.space.images), np.float32)
        scales[0] = 1.0
        for array, _ in self._coefficients.values():
            array.fill(0)
        for actor in self.actors:
            assert actor.evaluation is not None
            for image in actor.images:
                place = self.places[image]
                columns = {name: array[:, place] for name, (array, _) in self._coefficients.items()}
                fill_coefficients(columns, actor.evaluation, actor.held)
                scales[:, place] = actor.evaluation.scale
        for array, buffer in self._coefficients.values():
            buffer.upload(array)
        self.space.atol.upload(scales[0])
        self.space.rtol.upload(scales[1])
        return {name: buffer for name, (_, buffer) in self._coefficients.items()}


class ClosedLoop:
    """Runs one batch of actors over a loop's networks and memory."""

    def __init__(self, loop: Loop, rows_for: RowsFor, usage: Usage, callback: Callback | None = None) -> None:
        self._loop, self._rows_for, self._usage, self._callback = loop, rows_for, usage, callback
        self._calls = 0

    def run(self, actors: Sequence[Actor], noise: Floats) -> Floats:
        """From noise [B, C, H, W] to latents [B, C, H, W]; every image of the batch has one actor.

        Raises:
            NonFiniteError: a network gave NaN or infinity; names the evaluation.
        """
        self._noise, self._latents = noise, np.empty_like(noise)
        for actor in actors:
            actor.start()
        while active := [actor for actor in actors if actor.evaluation is not None]:
            rounds: dict[tuple[str, bool], list[Actor]] = {}
            for actor in active:
                assert actor.evaluation is not None
                rounds.setdefault((actor.evaluation.network, actor.evaluation.guided), []).append(actor)
            for (network, guided), together in rounds.items():
                self._evaluate(network, guided, together)
        return self._latents

    def _evaluate(self, network: str, guided: bool, actors: Sequence[Actor]) -> None:
        group, slot = self._grouped(actors, guided)
        space, trunk = group.space, self._loop.networks[network]
        self._undo(group)
        modulations = self._modulations(group, network)
        started = time.perf_counter()
        inputs = evaluation_inputs(space, group.rows) | {"mods": modulations, **group.coefficients()}
        inputs |= self._velocities(group) if network == "refiner" else {}
        trunk.engine.run(inputs, evaluation_outputs(space, slot, group.rows) | group.norms)
        space.flip()
        err, size = (group.norms[name].numpy().astype(np.float64) for name in ("err", "v_rms"))
        self._usage.add(network, time.perf_counter() - started)
        group.last = slot
        for actor in actors:
            actor.held[actor.made] = slot
            self._report(actor, network, err, size, group)

    def _velocities(self, group: _Group) -> dict[str, Buffer]:
        """A refiner's v and add; those of images whose slopes lie in different slots are brought together."""
        space, count = group.space, len(group.rows.labels)
        evaluations = [(actor, actor.evaluation) for actor in group.actors if actor.evaluation is not None]
        inputs: dict[str, Buffer] = {}
        for name, of in (("v", "condition"), ("add", "add")):
            slots = [actor.held[getattr(evaluation, of)] for actor, evaluation in evaluations]
            if len(set(slots)) == 1:
                inputs[name] = space.rows(slots[0], count)
                continue
            inputs[name] = self._loop.backend.buffer(space.rows(0, count).shape, np.float32)
            for slot, (actor, _) in zip(slots, evaluations, strict=True):
                for row in (row for image in actor.images for row in group.rows_at(image)):
                    inputs[name].slot(row).copy_from(space.rows(slot, count).slot(row))
        return inputs

    def _undo(self, group: _Group) -> None:
        """Puts images whose last step was given up back to where it started."""
        for actor in group.actors:
            if actor.evaluation is not None and actor.evaluation.undo:
                for place in (group.places[image] for image in actor.images):
                    group.space.base.slot(place).copy_from(group.space.spare.slot(place))

    def _modulations(self, group: _Group, network: str) -> Buffer:
        times = {
            group.places[image]: actor.evaluation.t
            for actor in group.actors if actor.evaluation is not None
            for image in actor.images
        }  # fmt: skip
        conditioner = self._loop.networks[network].conditioner
        some = next(iter(times.values()))
        pairs = [
            pair_of(times.get(int(place), some), label)
            for place, label in zip(group.rows.pair, group.rows.labels, strict=True)
        ]  # fmt: skip
        with self._usage.conditioning(conditioner):
            return conditioner.buffers([pairs])[0]

    def _grouped(self, actors: Sequence[Actor], guided: bool) -> tuple[_Group, int]:
        """The group of exactly these actors, with a slot for their next slopes; made if they were apart before."""
        group = actors[0].group
        together = group is not None and group.actors == tuple(actors) and all(a.group is group for a in actors)
        rows = self._rows_for([image for actor in actors for image in actor.images], guided)
        if not together or group is None or len(group.rows.labels) != len(rows.labels):
            group = self._gather(actors, rows)
        slot = free_slot([actor.held for actor in actors], group.last)
        if slot is None:  # many images, each with its slopes elsewhere
            group = self._gather(actors, rows)
            slot = free_slot([actor.held for actor in actors], group.last)
        assert slot is not None, "an actor needs more slopes than the history holds"
        return group, slot

    def _gather(self, actors: Sequence[Actor], rows: Rows) -> _Group:
        """Brings actors into one batch, what they hold in the first slots."""
        images = [image for actor in actors for image in actor.images]
        space = self._loop.workspaces.take(self._size(images, rows), len(rows.labels))
        group = _Group(self._loop.backend, space, actors, rows)
        for actor in actors:
            target = {name: slot for slot, name in enumerate(actor.held)}
            moves = {actor.held[name]: slot for name, slot in target.items()}
            for image in actor.images:
                place, old = group.places[image], actor.group
                if old is None:
                    space.base.slot(place).upload(self._noise[image])
                    continue
                pairs = list(zip(old.rows_at(image), group.rows_at(image), strict=False))
                space.image_from(place, old.space, old.places[image], moves, pairs)
            self._leave(actor)
            actor.held, actor.group = target, group
        group.last = max((len(actor.held) for actor in actors), default=0) - 1
        return group

    def _size(self, images: Sequence[int], rows: Rows) -> int:
        """Images of the engine's batch: these, or as many as the rows were filled up to."""
        return max(len(images), int(rows.pair.max()) + 1)

    def _leave(self, actor: Actor) -> None:
        group = actor.group
        if group is not None:
            group.staying -= 1
            if not group.staying:
                self._loop.workspaces.give_back(group.space)
        actor.group = None

    def _report(
        self, actor: Actor, network: str, err: NDArray[np.float64], size: NDArray[np.float64], group: _Group
    ) -> None:
        """Tells an actor what came of its evaluation; takes its latents when it is done."""
        assert actor.evaluation is not None
        places = [group.places[image] for image in actor.images]
        if not (np.isfinite(size[places]).all() and np.isfinite(err[places]).all()):
            raise broken_network(network, actor.made + 1, actor.evaluation.t)
        t, block = actor.evaluation.t, actor.evaluation.block
        actor.tell(Feedback(_rms(err[places]), _rms(size[places])))
        self._calls += 1
        if self._callback:
            self._callback({"index": self._calls - 1, "evaluations": None, "t": t, "block": block})
        if actor.evaluation is None:
            for image, place in zip(actor.images, places, strict=True):
                self._latents[image] = self._end_of(actor, group, place)
                if not np.isfinite(self._latents[image]).all():
                    raise broken_network(network, actor.made, t)
            self._leave(actor)

    def _end_of(self, actor: Actor, group: _Group, place: int) -> Floats:
        space = group.space
        if actor.end is None:
            last: Floats = space.base.slot(place).numpy()
            return last
        held = {name: space.slope_slots[slot].slot(place).numpy() for name, slot in actor.held.items()}
        end: Floats = combine(actor.end, space.spare.slot(place).numpy(), held).astype(np.float32)
        return end


def _rms(values: NDArray[np.float64]) -> float:
    """Over images of equal size the rms of their rms is that of all their numbers."""
    return math.sqrt(float(np.mean(np.square(values))))
