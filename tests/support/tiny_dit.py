"""A diffusion run of seconds: 8x8 digits."""

from ml_collections import ConfigDict


def get_config(variant: str = "A/4") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="dit", variant=variant, depth=2, learn_sigma=False),
            objective=dict(name="diffusion", path="straight", prediction="v"),
            data=dict(name="digits", batch_size=16),
            optimizer=dict(learning_rate=1e-3, ema_decays=(0.9,), grad_clip_norm=1.0, warmup="2 steps"),
            train=dict(duration="12 steps", log_every=1),
            sampling=dict(integrator="euler", steps=2),
            checkpoint=dict(every="4 steps"),
        )
    )
