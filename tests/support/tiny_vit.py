"""A classification run of seconds: 8x8 digits."""

from ml_collections import ConfigDict


def get_config(variant: str = "A/4") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="vit", variant=variant, depth=1),
            objective=dict(name="classification"),
            data=dict(name="digits", batch_size=16),
            optimizer=dict(learning_rate=1e-3),
            train=dict(duration="8 steps", log_every=1),
            evaluators=dict(val=dict(name="metrics", every="4 steps", batch_size=128)),
            checkpoint=dict(every="4 steps"),
        )
    )
