"""python -m flowturbo.demo.classifier_features: train the demo's feature extractor and write it as ONNX.

It is the classifier of `flowturbo.demo.classifier`. With it, pictures of the demo model can be measured on a machine
without a network. Its numbers compare only with its own.

Letters: B images.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from flowturbo.data.photographs import Photographs, list_photographs
from flowturbo.demo import FEATURE_EXTRACTOR
from flowturbo.demo.classifier import Classifier, load_or_train_classifier
from flowturbo.evaluation.quality.convert_extractor import OUTPUTS, save_extractor
from flowturbo.evaluation.quality.features import ExtractorInfo
from runtime.cli.command_base import PATH, Command
from runtime.system.files import make_folder

RESOLUTION = 64
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 4
"""Of the second last stage: 112 spatial features, few enough to be estimated from thousands of photographs."""
ABOUT = ExtractorInfo("demo", "bicubic", -1.0, 1.0, *OUTPUTS)


class DemoFeatures(nn.Module):
    """What sFID, FID and the Inception Score of the demo read."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = fold_batch_norms(classifier)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [B, 192], spatial ones [B, 112], probabilities [B, 10] of images [B, 3, 64, 64] in −1 … 1."""
        middle = self.classifier.body[:-1](images)
        spatial = F.adaptive_avg_pool2d(middle[:, :SPATIAL_CHANNELS], SPATIAL_SIDE).permute(0, 2, 3, 1).flatten(1)
        features = self.classifier.body[-1](middle).mean(dim=(2, 3))
        return features, spatial, self.classifier.head(features).softmax(dim=1)


def fold_batch_norms(classifier: Classifier) -> Classifier:
    """Fold normalisations into the convolutions before them, in place."""
    for block in list(classifier.modules()):
        if isinstance(block, nn.Sequential) and len(block) == 3 and isinstance(block[1], nn.BatchNorm2d):
            block[0] = fuse_conv_bn_eval(block[0], block[1])  # type: ignore[type-var]  # a convolution
            block[1] = nn.Identity()
    return classifier


@click.command(cls=Command)
@click.option("--data", type=PATH, help="Training split: a folder of class folders.")
@click.option("--classifier", type=PATH, help="Kept here; read where it is there already.")
@click.option("--epochs", default=14, show_default=True)
@click.option("--out", default=FEATURE_EXTRACTOR, type=PATH, help="[default: the package's own]")
def main(data: Path | None, classifier: Path | None, epochs: int, out: Path) -> None:
    """Train the classifier (10 minutes on two cores), or read it, and write the extractor."""
    make_folder(out.absolute().parent)  # before the minutes of training
    photographs = Photographs(list_photographs(data), RESOLUTION) if data is not None else None
    model = load_or_train_classifier(classifier, photographs, epochs)
    save_extractor(DemoFeatures(model), out, ABOUT, RESOLUTION, half=True)
    click.echo(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
