"""Evaluators of models that score images with texts: retrieval, and zero-shot classification."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling import data
from scaling.data.prompts import prompts
from scaling.errors import UserError
from scaling.evaluators.base import CheckInterrupt, Evaluator, data_of
from scaling.evaluators.captions import captions_of, placed
from scaling.evaluators.pair_scoring import pair_scores
from scaling.metrics.accuracy import topk_hits
from scaling.metrics.retrieval import clip_score, places, recalls
from scaling.models.clip import unit
from scaling.objectives.base import Extras
from scaling.objectives.contrastive import Contrastive
from scaling.objectives.vision_language import VisionLanguage
from scaling.parallel import tracing
from scaling.run.build import Run, shared_by_runs

QUERIES_PER_CALL = 1024  # number of queries compared with all candidates at a time


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluator):
    """Recall at 1, 5 and 10 among all pairs of a split, both ways; with two towers, the mean CLIP score too.

    All captions are candidates: if an image has several, the nearest one counts, and each of them has to find
    its image. Equal scores count against the right one. A model that reads image and caption at once needs a
    pass for each image with each caption; `pairs` limits it to the first images.
    """

    split: str = "test"
    pairs: int | None = None  # number of images from the start of the split; None for all

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise UserError(f"pairs={self.pairs}: must be at least 1, or None for all")

    def check(self, name: str, run: Run) -> None:
        """Checks also that the objective can score pairs.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        if not isinstance(run.objective, VisionLanguage):
            _contrastive(name, run)
        elif not (run.objective.itm or run.objective.retrieval):
            raise UserError(f"evaluators.{name}: scores pairs; give objective.itm or .retrieval a weight")
        super().check(name, run)

    def run(
        self,
        name: str,
        run: Run,
        weights: Mapping[str, Any],
        folder: Path,
        step: int,
        check_interrupt: CheckInterrupt,
    ) -> dict[str, float]:
        """Returns {name_i2t_r1, ..., name_t2i_r10}, image to text and text to image, and name_clip_score."""
        values: dict[str, float] = {}
        owner = captions_of(run.config.data, self.split).of(self.pairs).image  # [M]
        images = np.arange(owner[-1] + 1)
        if isinstance(run.objective, VisionLanguage):
            scores = pair_scores(run, weights, self.split, self.batch_size, self.pairs, check_interrupt)
            ranks = {
                "i2t": _all_places(scores, images, owner, check_interrupt),
                "t2i": _all_places(scores.T, owner, images, check_interrupt),
            }
        else:
            image, text = self._embed(name, run, weights, check_interrupt)
            values[f"{name}_clip_score"] = float(clip_score(image[owner], text).mean())
            ranks = {
                "i2t": _all_places(image, images, owner, check_interrupt, text.T),
                "t2i": _all_places(text, owner, images, check_interrupt, image.T),
            }
        for direction, all_places in ranks.items():
            values |= {f"{name}_{direction}_{k}": v for k, v in recalls(all_places).items()}
        return values

    def _embed(
        self, name: str, run: Run, weights: Mapping[str, Any], check_interrupt: CheckInterrupt
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the unit embeddings of images [N, E] and of all their captions [M, E], float32."""
        variables = weights["params"], weights["collections"]
        embed_images, image_rows = _make_embed_images(run), []
        for batch in self.batches(name, run, self.split):
            check_interrupt()
            embeddings, mask = embed_images(*variables, {"image": batch["image"]}, batch["mask"])
            image_rows.append(np.asarray(embeddings)[np.asarray(mask) > 0])
        texts = captions_of(run.config.data, self.split).of(self.pairs).tokens["text"]  # [M, L]
        batch_sharding, embed_texts, text_rows = self.batch_sharding(name, run), _make_embed_texts(run), []
        for start in range(0, len(texts), self.batch_size):
            check_interrupt()
            # The last caption fills the last batch.
            indices = np.minimum(start + np.arange(self.batch_size), len(texts) - 1)
            text_rows.append(np.asarray(embed_texts(*variables, placed(texts[indices], batch_sharding))))
        image, text = np.concatenate(image_rows)[: self.pairs], np.concatenate(text_rows)[: len(texts)]
        return jnp.asarray(image), jnp.asarray(text)


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Evaluator):
    """Accuracy of classifying an image by its similarity to captions that name each class.

    As in Radford et al. 2021, section 3.1.4: every template of a class is embedded and normalised to length
    1, and so is their mean. `classes` and `templates` name lists of the package (scaling.data.prompts), or
    are the lists themselves; in a template {} stands for the class.
    """

    data: dict[str, Any]  # options of the labelled images, whose labels are in the order of `classes`
    classes: str | tuple[str, ...]
    templates: str | tuple[str, ...] = "plain"
    split: str = "test"

    def __post_init__(self) -> None:
        self._prompts()

    def _prompts(self) -> list[list[str]]:
        return prompts(self.classes, self.templates)

    def check(self, name: str, run: Run) -> None:
        """Checks also that the objective is contrastive and that every class has a name.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        _contrastive(name, run)
        super().check(name, run)
        info, names = data.info(data_of(run, self.data, f"evaluators.{name}.data")), len(self._prompts())
        if info.num_classes != names:
            raise UserError(
                f"evaluators.{name}.classes: names {names}, and {info.name} has {info.num_classes}; name "
                "each class, in the order of the data"
            )

    def run(
        self,
        name: str,
        run: Run,
        weights: Mapping[str, Any],
        folder: Path,
        step: int,
        check_interrupt: CheckInterrupt,
    ) -> dict[str, float]:
        """Returns {name_top1, name_top5}."""
        params, collections = weights["params"], weights["collections"]
        tokenizer, embed_texts = data.tokenizer_of(run.config.data), _make_embed_texts(run)
        classes = []
        for captions in self._prompts():
            check_interrupt()
            texts = jnp.asarray(tokenizer(captions)["text"])  # [templates, L]
            classes.append(np.asarray(embed_texts(params, collections, texts)).mean(axis=0))
        class_embeddings = unit(jnp.asarray(np.stack(classes)))  # [K, E]
        hits, count = np.zeros(2), 0.0
        count_hits, images = _make_count_hits(run), data_of(run, self.data, f"evaluators.{name}.data")
        for batch in self.batches(name, run, self.split, images):
            check_interrupt()
            *batch_hits, examples = jax.device_get(count_hits(params, collections, batch, class_embeddings))
            hits, count = hits + np.array(batch_hits, np.float64), count + float(examples)
        return {f"{name}_top1": float(hits[0] / count), f"{name}_top5": float(hits[1] / count)}


def _contrastive(name: str, run: Run) -> Contrastive:
    if not isinstance(run.objective, Contrastive):
        other = run.config.objective.name
        raise UserError(f"evaluators.{name}: compares images with texts, which objective {other} cannot")
    return run.objective


def _all_places(
    queries: Any,
    query_ids: np.ndarray,
    candidate_ids: np.ndarray,
    check_interrupt: CheckInterrupt,
    candidates: jax.Array | None = None,
) -> np.ndarray:
    """Returns the `places` [N] of all queries, computed in blocks of queries.

    Candidate j is right for query i if `candidate_ids[j] == query_ids[i]`. `queries` are scores [N, M], or
    embeddings [N, E] that are scored with `candidates` [E, M].
    """
    blocks = []
    for start in range(0, len(queries), QUERIES_PER_CALL):
        check_interrupt()
        block = slice(start, start + QUERIES_PER_CALL)
        rows, own = jnp.asarray(queries[block]), query_ids[block, None] == candidate_ids[None]
        scores = rows if candidates is None else rows @ candidates  # [QUERIES_PER_CALL, M]
        blocks.append(np.asarray(places(scores, jnp.asarray(own))))
    return np.concatenate(blocks)


@shared_by_runs
def _make_embed_images(run: Run) -> Callable[..., Any]:
    """Returns a function (params, collections, batch, mask) -> unit embeddings [B, E], mask; replicated."""
    objective = _contrastive("", run)

    def step(params: Any, collections: Any, batch: Any, mask: jax.Array) -> Any:
        return unit(objective.features(params, Extras(collections=collections), batch)), mask

    return tracing.jit_replicated(run.mesh, step)


@shared_by_runs
def _make_embed_texts(run: Run) -> Callable[..., Any]:
    """Returns a function (params, collections, texts [N, L]) -> unit embeddings [N, E]; replicated."""
    objective = _contrastive("", run)

    def step(params: Any, collections: Any, text: jax.Array) -> jax.Array:
        return unit(objective.embed_texts(params, Extras(collections=collections), text))

    return tracing.jit_replicated(run.mesh, step)


@shared_by_runs
def _make_count_hits(run: Run) -> Callable[..., Any]:
    """Returns a function (params, collections, batch, classes [K, E]) -> top-1 hits, top-5 hits, examples."""
    objective = _contrastive("", run)

    def step(params: Any, collections: Any, batch: Any, classes: jax.Array) -> Any:
        image = unit(objective.features(params, Extras(collections=collections), batch))  # [B, E]
        logits, mask = image @ classes.T, batch["mask"]  # [B, K]
        return *((topk_hits(logits, batch["label"], k) * mask).sum() for k in (1, 5)), mask.sum()

    return tracing.jit_replicated(run.mesh, step)
