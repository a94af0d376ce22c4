"""CLIP on 3,953 OpenMoji drawings and their names: image-text pairs small enough for two cores.

    scaling train --config=configs/openmoji_clip.py:ViT-N/8 --workdir=runs/clip

Recall, from image to text and back, is measured among the 500 held-out pairs, each a new combination of known
words; chance at 1 is 0.002. 200 steps reach 0.64 and 0.67, in 3 minutes of one core. `tones_top1` is the
accuracy of a drawing's skin tone, by captions of the tones alone; chance is 0.2. `probe_top1` is the accuracy
of a linear classifier on the same images' embeddings.

To lock the image tower (Zhai et al. 2022, arXiv:2111.07991) at the weights of another run of CLIP, give

    --config.train.init_from=RUN --config.train.init_only=^image/
    "--config.optimizer.param_rules=[{'match': '^image/', 'frozen': True}]"

For the weights of a ViT that was trained or imported, leave out init_only, write '^image/(?!projection)' in
the rule, and add
--config.model.pre_norm=False --config.model.activation=gelu --config.model.epsilon=1e-6.
"""

from ml_collections import ConfigDict

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def get_config(variant: str = "ViT-N/8") -> ConfigDict:
    return ConfigDict(
        dict(
            model=dict(name="clip", variant=variant),
            objective=dict(name="contrastive"),
            data=dict(
                name="openmoji",
                image_size=32,
                batch_size=256,
                text=dict(name="clip", vocab_size=1000, max_length=16),
            ),
            optimizer=dict(
                learning_rate=2e-3,
                b2=0.98,
                weight_decay=0.1,
                schedule="cosine",
                warmup="10 %",
                grad_clip_norm=1.0,
            ),
            train=dict(duration="300 steps"),
            evaluators=dict(
                val=dict(name="retrieval"),
                tones=dict(
                    name="zero_shot",
                    data=dict(name="openmoji_tones"),
                    classes=tuple(f"{tone} skin tone" for tone in TONES),
                ),
                probe=dict(name="linear", inputs="features", data=dict(name="openmoji_tones")),
            ),
        )
    )
