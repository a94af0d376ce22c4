"""Stable Diffusion's autoencoder on ImageNet at 256x256, which makes the latents of `configs/dit.py`.

    tfds build imagenet2012 --file_format=array_record      (once; extra `tf`)
    scaling import --format=diffusers --config=configs/imagenet_vae.py sd-vae-ft-ema --out=runs/sd_vae
    scaling encode runs/sd_vae --config=configs/imagenet_vae.py --out=runs/imagenet256

Crops and mirror images are those of DiT (Peebles & Xie 2023, section 4). The recipe is for import and
encoding: training from scratch lacks the perceptual and adversarial terms of the released weights. Its
optimiser also differs from that of Rombach et al. 2022, whose rate of 4.5e-6 is for each example of a batch,
with b1=0.5, b2=0.9 and no warm-up. Hours and scores were not measured.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "SD") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="vae", variant=variant),
            objective=dict(name="autoencoder"),
            data=dict(
                name="tfds", builder="imagenet2012", batch_size=64, image_size=256,
                train_transforms=("adm_crop", "flip"), eval_transforms=("adm_crop",), workers=8,
            ),
            optimizer=dict(learning_rate=4.5e-6, warmup="1000 steps"),
            train=dict(duration="1 epochs", log_every=100),
            evaluators=dict(val=dict(name="metrics", split="validation", every="25 %")),
            checkpoint=dict(every="5 %"),
        )
    )  # fmt: skip
