"""Sources of examples: arrays, TFDS, latents, pairs of images and texts, video folders, generated sets."""
