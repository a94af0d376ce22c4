"""DiT's own recipe (Peebles & Xie 2023, section 4) on the latents of ImageNet at 256x256.

    scaling train --config=configs/dit.py:XL/2 --workdir=runs/dit_xl2

`configs/imagenet_vae.py` says how runs/imagenet256 is made. The authors' released weights come in by

    scaling import --format=facebookresearch --config=configs/dit.py:XL/2 DiT-XL-2-256x256.pt \\
        --out=runs/dit_xl2

The paper's FID-50K without guidance after 400K steps: S/2 68.4, XL/2 19.5. Hours and scores here: not
measured. Training S/2 takes 3.7e18 FLOPs, XL/2 takes 7.3e19 FLOPs.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "S/2") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(family="dit", variant=variant, dtype="bfloat16"),
            objective=dict(name="diffusion", path="ddpm-linear", prediction="eps", label_dropout=0.1),
            data=dict(name="latents", data_dir="runs/imagenet256", batch_size=256, workers=8),
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
