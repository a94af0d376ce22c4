"""DiT's own recipe (Peebles & Xie 2023, section 4) on ImageNet at 32x32 pixels.

    scaling train --config=configs/dit.py:S/2 --workdir=runs/dit_s2

A 32x32 image has as many patches as the 32x32 latent of a 256x256 image, so tokens, gmacs and the rest of
the recipe are the paper's (S/2: 6.06 gmacs, 68.4 FID-50K after 400K steps on latents). Prepare the data
once with `tfds build imagenet_resized/32x32 --file_format=array_record` (extra `tf`). Hours and scores on
pixels: not measured. Training S/2 takes 3.7e18 FLOPs, XL/2 takes 7.3e19 FLOPs.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "S/2") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(family="dit", variant=variant, dtype="bfloat16"),
            objective=dict(name="diffusion", path="ddpm-linear", prediction="eps", label_dropout=0.1),
            data=dict(
                name="tfds", builder="imagenet_resized/32x32", batch_size=256, augment=("flip",), workers=8
            ),
            optimizer=dict(learning_rate=1e-4, ema=(0.9999,)),
            train=dict(duration="400000 steps", log_every=100),
            evaluate=dict(
                val=dict(kind="metrics", split="validation", every="5 %"),
                grid=dict(kind="grid", every="5 %", sampling=dict(integrator="ddim", steps=50, guidance=4.0)),
            ),
            sampling=dict(integrator="ddpm", steps=250, guidance=1.5),
            checkpoint=dict(every="1 %"),
        )
    )
