"""ViViT and TimeSformer on clips of moving MNIST digits: which digit, and in which of 8 directions it moves.

    scaling train --config=configs/mnist_vivit.py --workdir=runs/mnist_vivit
    scaling train --config=configs/mnist_vivit.py:divided --workdir=runs/mnist_timesformer

The argument is a key of MODELS; `short` is the joint model on 4 frames for 2 epochs, which
`experiments/moving_mnist` sweeps. There is no augmentation: flips would turn the motions around.
"""

from ml_collections import ConfigDict

MODELS = {  # ViViT's models 1 to 4, and TimeSformer's divided attention
    "joint": dict(name="vivit", variant="F/7x2", attention="joint"),
    "factorised-encoder": dict(
        name="vivit", variant="F/7x2", attention="factorised-encoder", temporal_depth=2
    ),
    "factorised-self-attention": dict(name="vivit", variant="F/7x2", attention="factorised-self-attention"),
    "factorised-dot-product": dict(name="vivit", variant="F/7x2", attention="factorised-dot-product"),
    "divided": dict(name="timesformer", variant="F/7"),
    "short": dict(name="vivit", variant="F/7x2", attention="joint"),
}


def get_config(variant: str = "joint") -> ConfigDict:
    frames, epochs = (4, 2) if variant == "short" else (8, 3)
    return ConfigDict(
        dict(
            model=MODELS[variant],
            objective=dict(name="classification"),
            data=dict(name="moving_mnist", batch_size=64, video=dict(frames=frames, stride=2)),
            optimizer=dict(
                learning_rate=5e-3,
                b2=0.95,
                warmup="10 %",
                schedule="cosine",
                weight_decay=0.05,
                grad_clip_norm=1.0,
            ),
            train=dict(duration=f"{epochs} epochs"),
            evaluators=dict(val=dict(name="views", num_clips=1, num_crops=1, every="20 %", batch_size=256)),
            checkpoint=dict(every="25 %", keep=1),
        )
    )
