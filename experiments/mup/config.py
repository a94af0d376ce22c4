"""A diffusion transformer on the 8 x 8 digits of scikit-learn, measured by its loss on fixed noise."""

from ml_collections import ConfigDict


def get_config(variant: str = "F/2") -> ConfigDict:
    """Returns the config of a variant; the study sets the width, the rate and the parametrisation."""
    return ConfigDict(
        dict(
            model=dict(name="dit", variant=variant, depth=2, learn_sigma=False),
            objective=dict(name="diffusion", path="straight", prediction="v"),
            data=dict(name="digits", batch_size=64),
            optimizer=dict(learning_rate=1e-3, schedule="cosine", warmup="10 %"),
            train=dict(duration="200 steps", log_every=50),
            sampling=dict(integrator="euler"),
            evaluators=dict(
                fixed=dict(name="denoising_loss", examples=256, times=8, batch_size=256, every="100 %")
            ),
            checkpoint=dict(every="100 %"),
        )
    )
