"""Flow-matching DiT on CIFAR-10 in pixels: the MNIST study's next step, for one accelerator.

    tfds build cifar10 --file_format=array_record      (once; extra `tf`)
    scaling train --config=configs/cifar10_dit.py:S/4 --workdir=runs/cifar10_s4

Hours and distance were not measured. `fd_cifar10` is a distance of the features of `configs/cifar10_vit.py`.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "S/4") -> ConfigDict:
    sampling = dict(integrator="heun", steps=25)
    return ConfigDict(
        dict(
            model=dict(name="dit", variant=variant, learn_sigma=False, dtype="bfloat16"),
            objective=dict(name="diffusion", path="straight", prediction="v"),
            data=dict(name="tfds", builder="cifar10", batch_size=256, train_transforms=("flip",)),
            optimizer=dict(learning_rate=3e-4, warmup="2 %", grad_clip_norm=1.0, ema_decays=(0.999,)),
            train=dict(duration="300 epochs"),
            evaluators=dict(
                fd=dict(
                    name="frechet",
                    classifier="runs/cifar10_classifier",
                    classifier_config="configs/cifar10_vit.py",
                    samples=10000,
                    batch_size=1000,
                    every="10 %",
                    sampling=sampling,
                ),
                grid=dict(name="grid", every="10 %", sampling=sampling),
            ),
            sampling=sampling,
        )
    )
