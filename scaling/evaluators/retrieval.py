"""Evaluators of models that score images with texts: retrieval, and zero-shot classification."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling import data
from scaling.data import Data
from scaling.data.prompts import prompts
from scaling.errors import UserError
from scaling.evaluators.base import CheckInterrupt, Context, Evaluator, Measure, Weights, data_of
from scaling.evaluators.captions import Captions, captions_of, placed
from scaling.evaluators.pair_scoring import make_pair_scores
from scaling.metrics.accuracy import topk_hits
from scaling.metrics.kinds import with_error_names, with_errors
from scaling.metrics.retrieval import RECALLS, clip_score, places, recalls
from scaling.models.clip import Embeddings, unit
from scaling.objectives.base import Extras
from scaling.objectives.contrastive import Contrastive, compare
from scaling.objectives.vision_language import VisionLanguage
from scaling.parallel import tracing
from scaling.run.build import Run, shared_by_runs

QUERIES_PER_CALL = 1024  # number of queries compared with all candidates at a time
CHUNK = 256  # images that are compared with all texts at a time


@dataclass(frozen=True, kw_only=True)
class Retrieval(Evaluator):
    """Recall at 1, 5 and 10 among all pairs of a split, both ways; with two towers, the mean CLIP score too.

    All captions are candidates: if an image has several, the nearest one counts, and each of them has to find
    its image. Equal scores count against the right one. A model that reads image and caption at once needs a
    pass for each image with each caption; `pairs` limits it to the first images.
    """

    split: str = "test"
    pairs: int | None = None  # number of images from the start of the split; None for all

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks also that the objective can score pairs.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        if not isinstance(run.objective, VisionLanguage):
            _contrastive(name, run)
        elif not (run.objective.itm or run.objective.retrieval):
            raise UserError(f"evaluators.{name}: scores pairs; give objective.itm or .retrieval a weight")
        super().check(name, run, needed)

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        both = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in RECALLS]
        towers = not isinstance(run.objective, VisionLanguage)
        return with_error_names(
            f"{name}_{metric}" for metric in (*(["clip_score", "loss"] if towers else []), *both)
        )

    def prepare(self, context: Context) -> Measure:
        """Returns the measurement of {name_clip_score, name_loss, name_i2t_r1, ..., name_t2i_r10}.

        Directions are image to text and text to image; recalls have their standard errors. The loss is that
        of training, over all images with their first captions at once.
        """
        captions = captions_of(context.run.config.data, self.split).of(self.pairs)
        pairs = isinstance(context.run.objective, VisionLanguage)
        measure = self._by_pairs(context, captions) if pairs else self._by_embeddings(context, captions)
        return lambda weights, step: {f"{context.name}_{k}": v for k, v in measure(weights).items()}

    def _by_pairs(self, context: Context, captions: Captions) -> Callable[[Weights], dict[str, float]]:
        scores_of = make_pair_scores(context, self.split, self.batch_size, self.pairs)
        owner, images = captions.image, np.arange(captions.image[-1] + 1)  # [M], [N]

        def measure(weights: Weights) -> dict[str, float]:
            scores = scores_of(weights)  # [N, M]
            i2t = _all_places(scores, images, owner, context.check_interrupt)
            t2i = _all_places(scores.T, owner, images, context.check_interrupt)
            return _recalls(i2t, t2i)

        return measure

    def _by_embeddings(self, context: Context, captions: Captions) -> Callable[[Weights], dict[str, float]]:
        embed, owner = self._make_embed(context, captions), captions.image
        images, losses = np.arange(owner[-1] + 1), _make_losses(context.run)
        first = np.unique(owner, return_index=True)[1]  # the first caption of each image

        def measure(weights: Weights) -> dict[str, float]:
            image, text = embed(weights)  # [N, E], [M, E]
            i2t = _all_places(image, images, owner, context.check_interrupt, text.T)
            t2i = _all_places(text, owner, images, context.check_interrupt, image.T)
            score = float(clip_score(image[owner], text).mean())
            loss = float(losses(weights, image, text[first]).mean())
            return {"clip_score": score, "loss": loss, **_recalls(i2t, t2i)}

        return measure

    def _make_embed(
        self, context: Context, captions: Captions
    ) -> Callable[[Weights], tuple[jax.Array, jax.Array]]:
        """Returns a function weights -> unit embeddings float32 of images [N, E] and captions [M, E]."""
        embed_images, embed_texts = _make_embed_images(context.run), _make_embed_texts(context.run)
        texts, place = captions.tokens["text"], self.batch_sharding(context.name, context.run)  # [M, L]

        def embed(weights: Weights) -> tuple[jax.Array, jax.Array]:
            variables, image_rows, text_rows = (weights["params"], weights["collections"]), [], []
            for batch in self.batches(context, self.split):
                embeddings, mask = embed_images(*variables, {"image": batch["image"]}, batch["mask"])
                image_rows.append(np.asarray(embeddings)[np.asarray(mask) > 0])
            for start in range(0, len(texts), self.batch_size):
                context.check_interrupt()
                # The last caption fills the last batch.
                indices = np.minimum(start + np.arange(self.batch_size), len(texts) - 1)
                text_rows.append(np.asarray(embed_texts(*variables, placed(texts[indices], place))))
            image, text = np.concatenate(image_rows)[: self.pairs], np.concatenate(text_rows)[: len(texts)]
            return jnp.asarray(image), jnp.asarray(text)

        return embed


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
        super().__post_init__()
        self._prompts()

    def _prompts(self) -> list[list[str]]:
        return prompts(self.classes, self.templates)

    def check(self, name: str, run: Run, needed: Mapping[str, Run] | None = None) -> None:
        """Checks also that the objective is contrastive and that every class has a name.

        Raises:
            UserError: if this evaluator cannot measure the run.
        """
        _contrastive(name, run)
        super().check(name, run, needed)
        info, names = data.info(self.images(name, run)), len(self._prompts())
        if info.num_classes != names:
            raise UserError(
                f"evaluators.{name}.classes: names {names}, and {info.name} has {info.num_classes}; name "
                "each class, in the order of the data"
            )

    def images(self, name: str, run: Run) -> Data:
        """Returns the labelled images that `data` names.

        Raises:
            UserError: for a wrong option, or images of another shape.
        """
        return data_of(run, self.data, f"evaluators.{name}.data")

    def metrics(self, name: str, run: Run) -> tuple[str, ...]:
        return with_error_names([f"{name}_top1", f"{name}_top5"])

    def prepare(self, context: Context) -> Measure:
        """Returns the measurement of {name_top1, name_top5}, with their standard errors."""
        name, run = context.name, context.run
        tokenizer, embed_texts = data.tokenizer_of(run.config.data), _make_embed_texts(run)
        texts = [
            jnp.asarray(tokenizer(captions)["text"]) for captions in self._prompts()
        ]  # [templates, L] each
        count_hits, images = _make_count_hits(run), self.images(name, run)

        def measure(weights: Weights, step: int) -> dict[str, float]:
            variables, classes = (weights["params"], weights["collections"]), []
            for templates in texts:
                context.check_interrupt()
                classes.append(np.asarray(embed_texts(*variables, templates)).mean(axis=0))
            class_embeddings = unit(jnp.asarray(np.stack(classes)))  # [K, E]
            hits, count = np.zeros(2), 0.0
            for batch in self.batches(context, self.split, images):
                *batch_hits, examples = jax.device_get(count_hits(*variables, batch, class_embeddings))
                hits, count = hits + np.array(batch_hits, np.float64), count + float(examples)
            shares = {f"{name}_top{k}": float(hit / count) for k, hit in zip((1, 5), hits, strict=True)}
            return with_errors(shares, count)

        return measure


def _recalls(i2t: np.ndarray, t2i: np.ndarray) -> dict[str, float]:
    """Returns the recalls of both directions, and their standard errors, from the places of the queries."""
    both: dict[str, float] = {}
    for way, found in (("i2t", i2t), ("t2i", t2i)):
        both |= with_errors({f"{way}_{k}": v for k, v in recalls(found).items()}, len(found))
    return both


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
def _make_losses(run: Run) -> Callable[..., Any]:
    """Returns a function (weights, images [N, E], texts [N, E]) -> losses [N] of pairs among all others."""
    objective = _contrastive("", run)

    @jax.jit
    def losses(params: Any, image: jax.Array, text: jax.Array) -> jax.Array:
        count, rest = len(image), -len(image) % CHUNK  # zeros fill the last chunk
        image, text = (jnp.pad(each, ((0, rest), (0, 0))) for each in (image, text))
        pairs = Embeddings(image, text, jnp.exp(params["logit_scale"]), params.get("logit_bias"))
        real = jnp.arange(len(image)) < count
        return compare(pairs, real, objective.form, CHUNK)["loss"][:count]

    return lambda weights, image, text: losses(weights["params"], image, text)


@shared_by_runs
def _make_count_hits(run: Run) -> Callable[..., Any]:
    """Returns a function (params, collections, batch, classes [K, E]) -> top-1 hits, top-5 hits, examples."""
    objective = _contrastive("", run)

    def step(params: Any, collections: Any, batch: Any, classes: jax.Array) -> Any:
        image = unit(objective.features(params, Extras(collections=collections), batch))  # [B, E]
        logits, mask = image @ classes.T, batch["mask"]  # [B, K]
        return *((topk_hits(logits, batch["label"], k) * mask).sum() for k in (1, 5)), mask.sum()

    return tracing.jit_replicated(run.mesh, step)
