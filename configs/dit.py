"""DiT's own recipe (Peebles & Xie 2023, section 4) on the latents of ImageNet at 256x256.

    scaling train --config=configs/dit.py:XL/2 --workdir=runs/dit_xl2

`configs/imagenet_vae.py` says how to make runs/imagenet256. To import the authors' released weights:

    scaling import --format=facebookresearch --config=configs/dit.py:XL/2 DiT-XL-2-256x256.pt \\
        --out=runs/dit_xl2

The paper's FID-50K without guidance (--config.sampling.guidance_scale=1) after 400K steps is 68.4 for S/2 and
19.5 for XL/2, which the authors' PyTorch code brings to 18.1. Hours and scores were not measured here.
Training S/2 takes 3.7e18 FLOPs, XL/2 takes 7.3e19 FLOPs.

As in the authors' code, 3 of the 4 latent channels are guided. Differences from it: arithmetic is bfloat16
(float32 with TF32 there), moments are kept in float16, and pictures during training take 50 DDIM steps.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "S/2") -> ConfigDict:
    guided = dict(guidance_channels=3)
    return ConfigDict(
        dict(
            model=dict(name="dit", variant=variant, dtype="bfloat16"),
            objective=dict(name="diffusion", path="ddpm-linear", prediction="eps", condition_dropout=0.1),
            data=dict(name="latents", data_dir="runs/imagenet256", batch_size=256, workers=8),
            optimizer=dict(learning_rate=1e-4, ema_decays=(0.9999,)),
            train=dict(duration="400000 steps", log_every=100),
            evaluators=dict(
                val=dict(name="metrics", split="validation", every="5 %"),
                grid=dict(
                    name="grid",
                    every="5 %",
                    sampling=guided | dict(integrator="ddim", steps=50, guidance_scale=4.0),
                ),
            ),
            sampling=guided | dict(integrator="ddpm", steps=250, guidance_scale=1.5),
            checkpoint=dict(every="1 %"),
        )
    )
