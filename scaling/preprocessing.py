"""Normalisation of pixels before a model sees them; it belongs to the weights and is stored with them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scaling.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation of images, (pixel / 255 - mean) / std, with one number for all channels or one for each.

    The default maps 0..255 to [-1, 1].

    Raises:
        UserError: if numbers are not finite, a standard deviation is not positive, or their counts differ.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if not self.mean or not np.isfinite(self.mean).all():
            raise UserError(f"mean={self.mean}: must be one finite number, or one for each channel")
        if not np.isfinite(self.std).all() or min(self.std, default=0.0) <= 0.0:
            raise UserError(f"std={self.std}: must be one number greater than 0, or one for each channel")
        if len(self.mean) != len(self.std):
            raise UserError(f"std={self.std}: must be as many numbers as mean={self.mean}")

    def require_channels(self, channels: int) -> None:
        """Checks that this is for images with so many channels.

        Raises:
            UserError: if it is not.
        """
        if len(self.mean) not in (1, channels):
            raise UserError(f"mean={self.mean}: images have {channels} channels; give one number for each")

    def __call__(self, image: "jax.Array") -> "jax.Array":
        """Returns model inputs [..., C] float32 of uint8 images [..., C]; floats (latents) are unchanged."""
        x = image.astype(np.float32)
        if image.dtype != np.uint8:
            return x
        mean, std = (np.asarray(each, np.float64) for each in (self.mean, self.std))
        if len(mean) == 1:
            mean, std = mean[0], std[0]
        else:
            mean, std = (each.reshape((1,) * (image.ndim - 1) + (-1,)) for each in (mean, std))
        return x / np.asarray(255 * std, np.float32) - np.asarray(mean / std, np.float32)

    def range(self) -> tuple[float, float]:
        """Returns the minimum and maximum that a model sees of a pixel."""
        low = min(-m / s for m, s in zip(self.mean, self.std, strict=True))
        return low, max((1.0 - m) / s for m, s in zip(self.mean, self.std, strict=True))


SYMMETRIC = Preprocessing()  # to [-1, 1]
# Statistics of ImageNet's channels, as in torchvision, timm and Swin, and those of CLIP's data, by OpenAI.
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
