"""ResNet as torchvision's `resnet18` to `resnet152` name its tensors, and timm's of the same names."""

from scaling.convert import rules
from scaling.convert.rules import Layers, Rules
from scaling.models.resnet import ResNet

IGNORED = (r"\.num_batches_tracked$",)  # counts training steps, which nothing reads


def table(model: ResNet) -> Rules:
    """The tensors of a state dict."""
    found = _layer("conv1", "bn1", "stem", "norm_stem")
    for i, depth in enumerate(model.depths):
        theirs, ours = f"layer{i + 1}", f"stage{i + 1}"
        found += _block(f"{theirs}.0", f"{ours}/first", model.bottleneck)
        if i > 0 or model.bottleneck:
            down = f"{theirs}.0.downsample"
            found += _layer(f"{down}.0", f"{down}.1", f"{ours}/first/shortcut", f"{ours}/first/norm_shortcut")
        if depth > 1:
            found += _block(theirs + ".{i}", f"{ours}/blocks", model.bottleneck, range(1, depth))
    return found + rules.linear("fc", "head")


def _block(theirs: str, ours: str, bottleneck: bool, layers: Layers = None) -> Rules:
    found: Rules = []
    for j in range(1, 4 if bottleneck else 3):
        found += _layer(f"{theirs}.conv{j}", f"{theirs}.bn{j}", f"{ours}/conv{j}", f"{ours}/norm{j}", layers)
    return found


def _layer(theirs: str, their_norm: str, ours: str, our_norm: str, layers: Layers = None) -> Rules:
    return [
        *rules.convolution(theirs, ours, layers, bias=False),
        *rules.batch_norm(their_norm, our_norm, layers),
    ]
