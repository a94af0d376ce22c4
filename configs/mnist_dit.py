"""Class-conditional DiT on 4,000 MNIST digits in pixels: small enough for a scaling study on two cores.

    scaling train --config=configs/mnist_dit.py:P/7 --workdir=runs/mnist_p7

The path is straight and the model predicts its velocity (SiT), since few steps then suffice to sample. The
distance `fd_mnist` uses the features of a classifier (`configs/mnist_vit.py`), which is trained on the same
digits the first time it is needed.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "P/7") -> ConfigDict:
    sampling = dict(integrator="heun", steps=8)
    return ConfigDict(
        dict(
            model=dict(name="dit", variant=variant, learn_sigma=False),
            objective=dict(name="diffusion", path="straight", prediction="v", condition_dropout=0.1),
            data=dict(name="mnist", batch_size=32),
            optimizer=dict(learning_rate=1e-2, b2=0.95, warmup="5 %", grad_clip_norm=1.0, ema_decays=(0.99,)),
            train=dict(duration="1600 steps"),
            evaluators=dict(
                fd=dict(
                    name="frechet",
                    classifier="runs/mnist_classifier",
                    classifier_config="configs/mnist_vit.py:N/7",
                    samples=700,
                    batch_size=350,
                    sampling=sampling,
                ),
                # In the batches of the distance, so that the sampler is compiled once.
                grid=dict(name="grid", every="100 %", batch_size=350, sampling=sampling),
            ),
            sampling=sampling,
            checkpoint=dict(every="25 %", keep=1),
        )
    )
