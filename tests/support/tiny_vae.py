"""An autoencoder of seconds: 8x8 digits to 4x4 latents."""

from ml_collections import ConfigDict


def get_config(variant: str = "small") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="vae", variant=variant, widths=(4, 8), blocks=1, groups=2, latent_channels=3),
            objective=dict(name="autoencoder"),
            data=dict(name="digits", batch_size=16),
            optimizer=dict(name="sgd"),
            train=dict(duration="2 steps"),
            evaluators=dict(val=dict(name="metrics", every="100 %", batch_size=128)),
        )
    )
