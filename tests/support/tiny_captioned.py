"""A diffusion run of seconds on captions: OpenMoji drawings of 8 pixels."""

from ml_collections import ConfigDict


def get_config(variant: str = "tiny") -> ConfigDict:
    sampling = dict(integrator="euler", steps=2, guidance_scale=3.0, condition_split="test")
    return ConfigDict(
        dict(
            model=dict(name="captioned", variant=variant),
            objective=dict(name="diffusion", path="straight", prediction="v", condition_dropout=0.5),
            data=dict(
                name="openmoji",
                image_size=8,
                batch_size=16,
                text=dict(name="wordpiece", vocab_size=600, max_length=12),
            ),
            train=dict(duration="4 steps", log_every=1),
            sampling=sampling,
            evaluators=dict(
                val=dict(name="metrics", every="100 %", batch_size=128),
                grid=dict(name="grid", every="100 %", samples=8, batch_size=8, sampling=sampling),
            ),
        )
    )
