"""A diffusion run of seconds on clips of 8 pixels."""

from ml_collections import ConfigDict


def get_config(variant: str = "tiny") -> ConfigDict:
    sampling = dict(integrator="heun", steps=2, guidance_scale=2.0)
    return ConfigDict(
        dict(
            model=dict(name="clip_denoiser", variant=variant),
            objective=dict(name="diffusion", path="straight", prediction="v"),
            data=dict(
                name="counting",
                batch_size=8,
                image_size=8,
                video=dict(frames=4),
                train_transforms=("center_crop(1)", "flip"),
                eval_transforms=("center_crop(1)",),
            ),
            train=dict(duration="2 steps", log_every=1),
            sampling=sampling,
            evaluators=dict(
                val=dict(name="metrics", every="100 %", batch_size=8),
                grid=dict(name="grid", every="100 %", samples=5, batch_size=8, sampling=sampling),
            ),
        )
    )
