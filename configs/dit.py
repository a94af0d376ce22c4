"""DiT's own recipe (Peebles & Xie 2023, section 4) on the latents of ImageNet at 256x256.

    scaling train --config=configs/dit.py:XL/2 --workdir=runs/dit_xl2

`configs/imagenet_vae.py` says how runs/imagenet256 is made. The authors' released weights come in by

    scaling import --format=facebookresearch --config=configs/dit.py:XL/2 DiT-XL-2-256x256.pt \\
        --out=runs/dit_xl2

The paper's FID-50K without guidance (--config.sampling.guidance=1) after 400K steps: S/2 68.4, XL/2 19.5,
which the authors' PyTorch code brings to 18.1. Hours and scores here: not measured. Training S/2 takes 3.7e18
FLOPs, XL/2 takes 7.3e19 FLOPs.

As in the authors' code, 3 of the 4 latent channels are guided. Otherwise than there, arithmetic is bfloat16
(float32 with TF32 there), moments are kept in float16, and pictures during training are of 50 DDIM steps.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "S/2") -> ConfigDict:
    guided = dict(guidance_channels=3)
    return ConfigDict(
        dict(
            model=dict(family="dit", variant=variant, dtype="bfloat16"),
            objective=dict(name="diffusion", path="ddpm-linear", prediction="eps", label_dropout=0.1),
            data=dict(name="latents", data_dir="runs/imagenet256", batch_size=256, workers=8),
            optimizer=dict(learning_rate=1e-4, ema=(0.9999,)),
            train=dict(duration="400000 steps", log_every=100),
            evaluate=dict(
                val=dict(kind="metrics", split="validation", every="5 %"),
                grid=dict(
                    kind="grid",
                    every="5 %",
                    sampling=guided | dict(integrator="ddim", steps=50, guidance=4.0),
                ),
            ),
            sampling=guided | dict(integrator="ddpm", steps=250, guidance=1.5),
            checkpoint=dict(every="1 %"),
        )
    )
