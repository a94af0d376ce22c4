"""Evaluators of models that tell what fits: retrieval, and zero-shot classification."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from scaling import data
from scaling.data import Data
from scaling.data.prompts import prompts
from scaling.engine import sharding
from scaling.engine.build import Built, data_of
from scaling.engine.scoring import pair_scores
from scaling.errors import UserError
from scaling.metrics.accuracy import topk_hits
from scaling.metrics.retrieval import clip_score, places, recalls
from scaling.models.clip import unit
from scaling.objectives.base import Extras
from scaling.objectives.contrastive import Contrastive
from scaling.objectives.vision_language import VisionLanguage

BLOCK = 1024  # queries that meet all candidates at a time
Pulse = Callable[[], None]


@dataclass(frozen=True)
class Retrieval:
    """Recall at 1, 5 and 10 among all pairs of a split, both ways; of two towers the mean CLIP score too.

    Of an image with several captions the first counts. Equal scores count against the right one. A model that
    reads image and caption at once takes a pass for each of N * N pairs: `pairs` leaves all but the first N.
    """

    every: str = "25 %"
    split: str = "test"
    batch_size: int = 256
    pairs: int | None = None  # of the split; None: all

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise UserError(f"pairs={self.pairs}: must be at least 1, or None for all")

    def needs(self) -> list[tuple[str, str]]:
        return []

    def check(self, name: str, built: Built) -> None:
        if not isinstance(built.task, VisionLanguage):
            _contrastive(name, built)
        elif not (built.task.itm or built.task.retrieval):
            raise UserError(f"evaluate.{name}: scores pairs; give objective.itm or .retrieval a weight")
        sharding.batch_sharding(built.mesh, self.batch_size, f"evaluate.{name}.batch_size")

    def run(
        self, name: str, built: Built, weights: Mapping[str, Any], folder: Path, step: int, pulse: Pulse
    ) -> dict[str, float]:
        """{name_i2t_r1, ..., name_t2i_r10}, from image to text and from text to image; name_clip_score."""
        if isinstance(built.task, VisionLanguage):
            scores = pair_scores(built, weights, self.split, self.batch_size, self.pairs, pulse)
            ranks: dict[str, float] = {}
            for way, each in (("i2t", scores), ("t2i", scores.T)):
                place = np.asarray(places(jnp.asarray(each), jnp.arange(len(each))))
                ranks |= {f"{name}_{way}_{k}": v for k, v in recalls(place).items()}
            return ranks
        embed = _embed(built)
        rows: list[tuple[np.ndarray, ...]] = []
        for batch in _batches(built.config.data, self.split, self.batch_size, built, name):
            pulse()
            mask = batch.pop("mask")
            image, text, exists = embed(weights["params"], weights["collections"], batch, mask)
            real = np.asarray(exists) > 0
            rows.append((np.asarray(image)[real], np.asarray(text)[real]))
        image, text = (np.concatenate(each)[: self.pairs] for each in zip(*rows, strict=True))  # [N, E] each
        values = {f"{name}_clip_score": float(clip_score(jnp.asarray(image), jnp.asarray(text)).mean())}
        for way, queries, candidates in (("i2t", image, text), ("t2i", text, image)):
            found = []
            for start in range(0, len(queries), BLOCK):
                pulse()
                found.append(_found(queries[start : start + BLOCK], candidates, start))
            values |= {f"{name}_{way}_{k}": v for k, v in recalls(np.concatenate(found)).items()}
        return values


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy of naming the class of an image, by how near it lies to captions that name each class.

    As Radford et al. 2021, section 3.1.4: every template of a class is embedded and brought to length 1, and
    their mean again. `classes` and `templates` name lists that the package has (scaling.data.prompts), or are
    the lists themselves; in a template {} stands for the class. `data` are the labelled images, as in a
    config's section, in the order of `classes`.
    """

    data: dict[str, Any]
    classes: str | tuple[str, ...]
    templates: str | tuple[str, ...] = "plain"
    every: str = "25 %"
    split: str = "test"
    batch_size: int = 256

    def __post_init__(self) -> None:
        self._prompts()

    def _prompts(self) -> list[list[str]]:
        return prompts(self.classes, self.templates)

    def needs(self) -> list[tuple[str, str]]:
        return []

    def check(self, name: str, built: Built) -> None:
        _contrastive(name, built)
        sharding.batch_sharding(built.mesh, self.batch_size, f"evaluate.{name}.batch_size")
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
            classes.append(np.asarray(embed(params, collections, texts)))
        towards = jnp.asarray(np.stack(classes))  # [K, E]
        hits, count = np.zeros(2), 0.0
        score, images = _classify(built), data_of(built, self.data, f"evaluate.{name}.data")
        for batch in _batches(images, self.split, self.batch_size, built, name):
            pulse()
            found = jax.device_get(score(params, collections, batch, towards))
            hits, count = hits + np.array(found[:2], np.float64), count + float(found[2])
        return {f"{name}_top1": float(hits[0] / count), f"{name}_top5": float(hits[1] / count)}


def _contrastive(name: str, built: Built) -> Contrastive:
    if not isinstance(built.task, Contrastive):
        other = built.config.objective.name
        raise UserError(f"evaluate.{name}: compares images with texts, which objective {other} cannot")
    return built.task


def _batches(chosen: Data, split: str, size: int, built: Built, name: str) -> Iterator[dict[str, jax.Array]]:
    place = sharding.batch_sharding(built.mesh, size, f"evaluate.{name}.batch_size")
    return data.eval_batches(chosen, split, size, place)


@jax.jit
def _found(queries: jax.Array, candidates: jax.Array, start: int) -> jax.Array:
    return places(queries @ candidates.T, start + jnp.arange(len(queries)))


@lru_cache(maxsize=1)
def _embed(built: Built) -> Callable[..., Any]:
    """(params, collections, batch, mask) -> images [B, E], captions [B, E] and the mask, on every process."""
    whole = NamedSharding(built.mesh, PartitionSpec())

    def step(params: Any, collections: Any, batch: Any, mask: Any) -> Any:
        image, text, *_ = _contrastive("", built).embed(params, Extras(collections=collections), batch)
        return image, text, mask

    return jax.jit(sharding.on(built.mesh, step), out_shardings=whole)


@lru_cache(maxsize=1)
def _embed_texts(built: Built) -> Callable[..., Any]:
    """(params, collections, texts [N, L] of one class) -> its direction [E]."""
    task = _contrastive("", built)

    def step(params: Any, collections: Any, text: jax.Array) -> jax.Array:
        return unit(unit(task.embed_texts(params, Extras(collections=collections), text)).mean(axis=0))

    return jax.jit(sharding.on(built.mesh, step))


@lru_cache(maxsize=1)
def _classify(built: Built) -> Callable[..., Any]:
    """(params, collections, batch, classes [K, E]) -> hits among the first, the first five, and examples."""
    task = _contrastive("", built)

    def step(params: Any, collections: Any, batch: Any, classes: jax.Array) -> Any:
        image = unit(task.features(params, Extras(collections=collections), batch))  # [B, E]
        logits, mask = image @ classes.T, batch["mask"]  # [B, K]
        return *((topk_hits(logits, batch["label"], k) * mask).sum() for k in (1, 5)), mask.sum()

    return jax.jit(sharding.on(built.mesh, step))
