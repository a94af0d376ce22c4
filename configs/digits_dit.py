"""DiT on the 8 x 8 digits of scikit-learn, measured by its loss on fixed noise: a run of seconds.

    scaling train --config=configs/digits_dit.py:F/2 --workdir=runs/digits_f2

Nothing is downloaded. `experiments/mup` varies its width and its learning rate.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "F/2") -> ConfigDict:
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
