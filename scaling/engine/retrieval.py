"""Evaluators of models that tell what fits: retrieval, and zero-shot classification."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling import data
from scaling.data.prompts import prompts
from scaling.engine import tracing
from scaling.engine.build import Built, data_of
from scaling.engine.captions import captions_of, placed
from scaling.engine.evaluator import Evaluator, Pulse
from scaling.engine.scoring import pair_scores
from scaling.errors import UserError
from scaling.metrics.accuracy import topk_hits
from scaling.metrics.retrieval import clip_score, places, recalls
from scaling.models.clip import unit
from scaling.objectives.base import Extras
from scaling.objectives.contrastive import Contrastive
from scaling.objectives.vision_language import VisionLanguage

BLOCK = 1024  # queries that meet all candidates at a time


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluator):
    """Recall at 1, 5 and 10 among all pairs of a split, both ways; of two towers the mean CLIP score too.

    All captions are candidates; of an image that has several, the nearest counts, and each looks for its
    image. Equal scores count against the right one. A model that reads image and caption at once takes a pass
    for each image with each caption: `pairs` keeps the first images alone.
    """

    split: str = "test"
    pairs: int | None = None  # images of the split; None: all

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise UserError(f"pairs={self.pairs}: must be at least 1, or None for all")

    def check(self, name: str, built: Built) -> None:
        if not isinstance(built.task, VisionLanguage):
            _contrastive(name, built)
        elif not (built.task.itm or built.task.retrieval):
            raise UserError(f"evaluate.{name}: scores pairs; give objective.itm or .retrieval a weight")
        super().check(name, built)

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """{name_i2t_r1, ..., name_t2i_r10}, from image to text and from text to image; name_clip_score."""
        values: dict[str, float] = {}
        owner = captions_of(built.config.data, self.split).of(self.pairs).image  # [M]
        images = np.arange(owner[-1] + 1)
        if isinstance(built.task, VisionLanguage):
            made = pair_scores(built, weights, self.split, self.batch_size, self.pairs, pulse)
            found = {
                "i2t": _places(made, images, owner, pulse),
                "t2i": _places(made.T, owner, images, pulse),
            }
        else:
            image, text = self._embedded(name, built, weights, pulse)
            values[f"{name}_clip_score"] = float(clip_score(image[owner], text).mean())
            found = {
                "i2t": _places(image, images, owner, pulse, text.T),
                "t2i": _places(text, owner, images, pulse, image.T),
            }
        for way, ranks in found.items():
            values |= {f"{name}_{way}_{k}": v for k, v in recalls(ranks).items()}
        return values

    def _embedded(
        self, name: str, built: Built, weights: Mapping[str, Any], pulse: Pulse
    ) -> tuple[jax.Array, jax.Array]:
        """The directions of images [N, E] and of all their captions [M, E], float32."""
        variables = weights["params"], weights["collections"]
        embed, seen = _embed_images(built), []
        for batch in self.batches(name, built, self.split):
            pulse()
            made, mask = embed(*variables, {"image": batch["image"]}, batch["mask"])
            seen.append(np.asarray(made)[np.asarray(mask) > 0])
        texts = captions_of(built.config.data, self.split).of(self.pairs).tokens["text"]  # [M, L]
        place, read, said = self.place(name, built), _embed_texts(built), []
        for start in range(0, len(texts), self.batch_size):
            pulse()
            rows = np.minimum(start + np.arange(self.batch_size), len(texts) - 1)  # the last one fills up
            said.append(np.asarray(read(*variables, placed(texts[rows], place))))
        image, text = np.concatenate(seen)[: self.pairs], np.concatenate(said)[: len(texts)]
        return jnp.asarray(image), jnp.asarray(text)


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Evaluator):
    """Accuracy of naming the class of an image, by how near it lies to captions that name each class.

    As Radford et al. 2021, section 3.1.4: every template of a class is embedded and brought to length 1, and
    their mean again. `classes` and `templates` name lists that the package has (scaling.data.prompts), or are
    the lists themselves; in a template {} stands for the class. `data` are the labelled images, as in a
    config's section, in the order of `classes`.
    """

    data: dict[str, Any]
    classes: str | tuple[str, ...]
    templates: str | tuple[str, ...] = "plain"
    split: str = "test"

    def __post_init__(self) -> None:
        self._prompts()

    def _prompts(self) -> list[list[str]]:
        return prompts(self.classes, self.templates)

    def check(self, name: str, built: Built) -> None:
        _contrastive(name, built)
        super().check(name, built)
        info, named = data.info(data_of(built, self.data, f"evaluate.{name}.data")), len(self._prompts())
        if info.num_classes != named:
            raise UserError(
                f"evaluate.{name}.classes: names {named}, and {info.name} has {info.num_classes}; name "
                "each class, in the order of the data"
            )

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """{name_top1, name_top5}."""
        params, collections = weights["params"], weights["collections"]
        tokenizer, embed = data.tokenizer_of(built.config.data), _embed_texts(built)
        classes = []
        for captions in self._prompts():
            pulse()
            texts = jnp.asarray(tokenizer(captions)["text"])  # [templates, L]
            classes.append(np.asarray(embed(params, collections, texts)).mean(axis=0))
        towards = unit(jnp.asarray(np.stack(classes)))  # [K, E]
        hits, count = np.zeros(2), 0.0
        score, images = _classify(built), data_of(built, self.data, f"evaluate.{name}.data")
        for batch in self.batches(name, built, self.split, images):
            pulse()
            found = jax.device_get(score(params, collections, batch, towards))
            hits, count = hits + np.array(found[:2], np.float64), count + float(found[2])
        return {f"{name}_top1": float(hits[0] / count), f"{name}_top5": float(hits[1] / count)}


def _contrastive(name: str, built: Built) -> Contrastive:
    if not isinstance(built.task, Contrastive):
        other = built.config.objective.name
        raise UserError(f"evaluate.{name}: compares images with texts, which objective {other} cannot")
    return built.task


def _places(
    queries: Any, mine: np.ndarray, owner: np.ndarray, pulse: Pulse, towards: jax.Array | None = None
) -> np.ndarray:
    """`places` [N] of all queries, in blocks; candidate j is right for query i if `owner[j] == mine[i]`.

    `queries` are scores [N, M], or directions [N, E] whose scores are those with `towards` [E, M].
    """
    found = []
    for start in range(0, len(queries), BLOCK):
        pulse()
        rows, own = (
            jnp.asarray(queries[start : start + BLOCK]),
            mine[start : start + BLOCK, None] == owner[None],
        )
        scores = rows if towards is None else rows @ towards  # [BLOCK, M]
        found.append(np.asarray(places(scores, jnp.asarray(own))))
    return np.concatenate(found)


@lru_cache(maxsize=1)
def _embed_images(built: Built) -> Callable[..., Any]:
    """(params, collections, batch, mask) -> directions [B, E] and the mask, on every process."""
    task = _contrastive("", built)

    def step(params: Any, collections: Any, batch: Any, mask: jax.Array) -> Any:
        return unit(task.features(params, Extras(collections=collections), batch)), mask

    return tracing.whole(built.mesh, step)


@lru_cache(maxsize=1)
def _embed_texts(built: Built) -> Callable[..., Any]:
    """(params, collections, texts [N, L]) -> directions [N, E], on every process."""
    task = _contrastive("", built)

    def step(params: Any, collections: Any, text: jax.Array) -> jax.Array:
        return unit(task.embed_texts(params, Extras(collections=collections), text))

    return tracing.whole(built.mesh, step)


@lru_cache(maxsize=1)
def _classify(built: Built) -> Callable[..., Any]:
    """(params, collections, batch, classes [K, E]) -> hits among the first, the first five, and examples."""
    task = _contrastive("", built)

    def step(params: Any, collections: Any, batch: Any, classes: jax.Array) -> Any:
        image = unit(task.features(params, Extras(collections=collections), batch))  # [B, E]
        logits, mask = image @ classes.T, batch["mask"]  # [B, K]
        return *((topk_hits(logits, batch["label"], k) * mask).sum() for k in (1, 5)), mask.sum()

    return tracing.whole(built.mesh, step)
