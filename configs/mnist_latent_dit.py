"""Class-conditional DiT on the latents of 4,000 MNIST digits: `configs/mnist_dit.py` behind an autoencoder.

    scaling train --config=configs/mnist_vae.py --workdir=runs/mnist_vae
    scaling encode runs/mnist_vae --config=configs/mnist_vae.py --out=runs/mnist_latents
    scaling train --config=configs/mnist_latent_dit.py:P/1 --workdir=runs/mnist_latent_p1

A 7x7 latent in patches of one has as many tokens, and gmacs (0.0031), as 28x28 pixels in patches of four. The
gmacs leave out the autoencoder, its training and its decoder.

One run, seed 0: `fd_mnist` 6.0, 2.1, 1.2, 0.96 after 400, 800, 1,200, 1,600 steps (real digits 0.21; in
pixels P/4 reached 6.5 in `experiments/mnist_dit`), and most samples are legible digits. It took 4.7 minutes
of CPU time with the classifier, and 9 minutes of wall time without it, on two cores shared with other work.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "P/1") -> ConfigDict:
    sampling = dict(integrator="heun", steps=8)
    return ConfigDict(
        dict(
            model=dict(name="dit", variant=variant, learn_sigma=False),
            objective=dict(name="diffusion", path="straight", prediction="v", condition_dropout=0.1),
            data=dict(name="latents", data_dir="runs/mnist_latents", batch_size=32),
            optimizer=dict(learning_rate=1e-2, b2=0.95, warmup="5 %", grad_clip_norm=1.0, ema_decays=(0.99,)),
            train=dict(duration="1600 steps"),
            evaluators=dict(
                fd=dict(
                    name="frechet",
                    classifier="runs/mnist_classifier",
                    classifier_config="configs/mnist_vit.py:N/7",
                    sampling=sampling,
                ),
                grid=dict(name="grid", every="100 %", sampling=sampling),
            ),
            sampling=sampling,
            checkpoint=dict(every="25 %", keep=1),
        )
    )
