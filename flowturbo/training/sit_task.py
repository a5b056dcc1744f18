"""Training a SiT: velocity matching on the linear path.

Letters: B images, C latent channels, H = W latent side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowturbo.checkpoints import save_network
from flowturbo.data.latents import LatentSource, RawBatch
from flowturbo.data.photographs import Pixels, find_class_name
from flowturbo.flow import VelocityNetwork, flow_loss
from flowturbo.models.sit import SiT, SiTConfig
from flowturbo.models.vae import Vae
from flowturbo.training.config import FlowConfig
from flowturbo.training.loop import Losses
from flowturbo.training.preview import decode_latents, sample_heun
from flowturbo.training.random_draws import Microbatch, make_generator, sample_indices
from flowturbo.training.run_log import describe_file
from runtime.sampling.noise import sample_noise
from runtime.system.errors import TrainingError

PREVIEW_ROWS, PREVIEW_STEPS, PREVIEW_GUIDANCE = 8, 12, 3.0


class LatentBatch(NamedTuple):
    """Samples, before latents are drawn from their posteriors.

    Attributes:
        raw: what the source reads of them.
        posterior_noise: [B, C, H, W] noise that draws latents from their posteriors.
        noise: [B, C, H, W] the start of the path.
        t: [B] flow times.
        labels, labels_with_dropout: [B] classes, and the same after label dropout.
    """

    raw: RawBatch
    posterior_noise: Tensor
    noise: Tensor
    t: Tensor
    labels: Tensor
    labels_with_dropout: Tensor


def load_latent_batch(
    source: LatentSource, config: FlowConfig, classes: int, seed: int, positions: range
) -> LatentBatch:
    """Return the samples at some positions; the randomness of each depends on (seed, position) alone."""
    indices = sample_indices(seed, positions, len(source))
    mirrored = np.zeros(len(indices), dtype=np.bool_)
    is_dropped = np.zeros(len(indices), dtype=np.bool_)
    t = np.zeros(len(indices), dtype=np.float32)
    normals = np.empty((2, len(indices), *source.manifest.shape), dtype=np.float32)
    for index, position in enumerate(positions):
        g = make_generator(seed, position)
        mirrored[index], is_dropped[index] = g.random() < 0.5, g.random() < config.label_dropout
        t[index] = (
            g.random() if config.times == "uniform" else 1 / (1 + np.exp(-config.times_mean - g.standard_normal()))
        )
        g.standard_normal(dtype=np.float32, out=normals[0, index])
        g.standard_normal(dtype=np.float32, out=normals[1, index])
    raw, labels = source.read(indices, mirrored)
    labels_with_dropout = np.where(is_dropped, classes, labels)
    return LatentBatch(raw, *map(torch.from_numpy, (normals[0], normals[1], t, labels, labels_with_dropout)))


def check_network_fits(model: SiT, source: LatentSource) -> None:
    """Raise TrainingError if the network and the latents have different shapes or labels."""
    config, (channels, side, _) = model.config, source.manifest.shape
    if (config.out_channels, config.latent_size) != (channels, side):
        raise TrainingError(
            f"the network takes latents of {config.out_channels} × {config.latent_size}², "
            f"the data are {channels} × {side}²",
            allowed="the same channels and side",
            remedy="make latents at this resolution with this VAE, or change --resolution",
        )
    if int(source.labels.max()) >= config.classes:
        raise TrainingError(
            f"the data have label {int(source.labels.max())}, the network {config.classes} classes",
            allowed=f"labels 0 to {config.classes - 1}",
            remedy="--num-classes with more classes",
        )


def check_null_label(config: SiTConfig) -> None:
    """Raise TrainingError if a network has no null label: dropped labels and guided previews need it."""
    if not config.has_null_label:
        raise TrainingError(
            f"a network of {config.classes} classes without a null label cannot be trained on",
            allowed="label tables with one row more than classes",
            remedy="add a row to y_embedder.embedding_table.weight, or train without --init",
        )


class LatentTask:
    """What trainings of a SiT or a refiner on latents have in common.

    Attributes:
        kind: name of the task in a run's config.json.
        model: what is trained.
        source: of the latents.
        seed: of everything that is drawn.
        vae: decodes the sample grids, if there are any.
        files: checkpoints that the networks were read from, by what they are.
    """

    kind: str

    def __init__(self, model: SiT, source: LatentSource, seed: int, vae: Vae | None, files: Mapping[str, Path]) -> None:
        check_network_fits(model, source)
        self.model, self.source, self.seed, self.vae, self.files = model, source, seed, vae, dict(files)

    @property
    def network(self) -> nn.Module:
        """The module that is trained."""
        return self.model

    def to(self, device: torch.device) -> None:
        """Move the network and all that its losses need."""
        for part in (self.model, *((self.vae.module,) if self.vae else ())):
            part.to(device)
        self.source.to(device)

    def describe_with(self, **details: object) -> dict[str, object]:
        """Return what a run records, with what only this kind of task has."""
        return {
            "task": self.kind,
            "model": self.model.config.to_json(),
            **details,
            "provenance": self.describe_provenance(),
            "data": self.source.describe(),
            "files": {name: describe_file(path) for name, path in self.files.items()},
        }

    def describe_provenance(self) -> dict[str, object]:
        """Return what the metadata of the trained network says about its data and its VAE."""
        manifest, used_labels = self.source.manifest, {str(label) for label in np.unique(self.source.labels)}
        return {
            "classes": {
                label: find_class_name(folder)
                for label, folder in (manifest.names or {}).items()
                if label in used_labels
            },
            "vae_factor": manifest.resolution // manifest.shape[1],
            "resolution": manifest.resolution,
            "vae": manifest.vae,
            "scaling_factor": manifest.scaling_factor,
        }

    def list_unreadable(self) -> dict[str, str]:
        """Return the files that could not be read so far, and why."""
        return self.source.list_unreadable()


class SitTask(LatentTask):
    """Velocity matching of a SiT on latents."""

    kind = "sit"

    def __init__(
        self,
        model: SiT,
        source: LatentSource,
        config: FlowConfig,
        seed: int,
        vae: Vae | None = None,
        compile: bool = False,
        init: Path | None = None,
        fresh: tuple[str, ...] = (),
    ) -> None:
        super().__init__(model, source, seed, vae, {"init": init} if init else {})
        self.config, self.fresh = config, fresh
        self.velocity: VelocityNetwork = torch.compile(model) if compile else model

    def describe(self) -> dict[str, object]:
        """Return everything beside the loop's options that is needed to repeat the run."""
        fresh = {"fresh": list(self.fresh)} if self.fresh else {}
        return self.describe_with(flow=asdict(self.config), **fresh)

    def describe_provenance(self) -> dict[str, object]:
        """Return what the metadata of the trained network says about its training.

        Without label dropout the null label stays as it was drawn, so nothing is guided unless somebody asks for it.
        """
        dropout = self.config.label_dropout
        return {**super().describe_provenance(), "label_dropout": dropout, **({} if dropout else {"guidance": 1.0})}

    def load_batch(self, microbatch: Microbatch) -> LatentBatch:
        """Return the samples of a share."""
        return load_latent_batch(self.source, self.config, self.model.config.classes, self.seed, microbatch.positions)

    def compute_losses(self, batch: LatentBatch) -> Losses:
        """Return the mean flow-matching loss."""
        data = self.source.sample(batch.raw, batch.posterior_noise)
        return {"loss": flow_loss(self.velocity, data, batch.noise, batch.t, batch.labels_with_dropout).mean()}

    def render_preview(self, ema: nn.Module) -> tuple[Pixels, int] | None:
        """Draw one column per class (the first ten), seeds 0, 1, … downwards."""
        assert isinstance(ema, SiT)
        if self.vae is None:
            return None
        noise, labels, columns = build_preview_grid(self.source, self.vae.device)
        guidance = PREVIEW_GUIDANCE if self.config.label_dropout else 1.0
        return decode_latents(self.vae, sample_heun(ema, noise, labels, PREVIEW_STEPS, guidance)), columns

    def save_result(self, ema: nn.Module, out: Path) -> Path:
        """Save the averaged weights as `out/final.safetensors`."""
        assert isinstance(ema, SiT)
        save_network(out / "final.safetensors", ema, role="predictor", extra=self.describe_provenance())
        return out / "final.safetensors"


def build_preview_grid(source: LatentSource, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return noise [B, C, H, W] and labels [B] of a grid with a column per class (the first ten), and its columns."""
    classes = np.unique(source.labels)[:10]
    channels, side, _ = source.manifest.shape
    noise = torch.from_numpy(sample_noise(range(PREVIEW_ROWS), (channels, side, side)))
    return (
        noise.repeat_interleave(len(classes), dim=0).to(device),
        torch.from_numpy(classes).repeat(PREVIEW_ROWS).to(device),
        len(classes),
    )
