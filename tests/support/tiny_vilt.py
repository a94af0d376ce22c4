"""ViLT on OpenMoji drawings of 8 pixels, a run of seconds."""

from ml_collections import ConfigDict


def get_config(variant: str = "A/4") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="vilt", variant=variant, depth=1, tasks=("itm", "mlm", "retrieval")),
            objective=dict(name="vision_language", retrieval=1.0, captions=3),
            data=dict(
                name="openmoji",
                image_size=8,
                batch_size=16,
                text=dict(name="wordpiece", vocab_size=600, max_length=12),
            ),
            train=dict(duration="4 steps", log_every=1),
        )
    )
