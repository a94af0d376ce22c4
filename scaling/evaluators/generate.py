"""Generation of images with a run's weights, for evaluators and `scaling sample`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling.data import cyclic_batches
from scaling.errors import NotFinite, UserError
from scaling.evaluators import autoencoder
from scaling.evaluators.base import require_images
from scaling.models.conditioning import ClassLabel, Condition
from scaling.objectives.base import Helper
from scaling.objectives.diffusion import Diffusion
from scaling.parallel import sharding, tracing
from scaling.run.build import Run, shared_by_runs
from scaling.sampling import Sampler, Sampling, make_sampler, to_uint8
from scaling.validation import in_section


def diffusion_of(name: str, run: Run) -> Diffusion:
    """Returns the run's diffusion objective.

    Raises:
        UserError: if it has another objective; it names the evaluator.
    """
    if not isinstance(run.objective, Diffusion):
        raise UserError(
            f"evaluators.{name}: generates images, which objective {run.config.objective.name} cannot"
        )
    return run.objective


def sampler_of(options: Sampling, objective: Diffusion, run: Run, section: str = "sampling") -> Sampler:
    """Makes the sampler of a run's images or latents by the options of a config's `section`.

    Raises:
        UserError: if they ask for tiles of latents and the samples are pixels, or for conditions that are
            not there.
    """
    if options.decode_tile is not None and run.info.latents is None:
        raise UserError(
            f"{section}.decode_tile={options.decode_tile}: this run's samples are pixels; leave it out"
        )
    if options.condition_split:
        require_images(
            run.config.data, options.condition_split, run.image_shape, f"{section}.condition_split"
        )
    elif not isinstance(objective.conditioning, ClassLabel):
        raise UserError(
            f"{section}.condition_split='': {run.config.model.name} is conditioned on more than a class; "
            "name the split whose examples' conditions the samples take"
        )
    try:
        return make_sampler(options, objective, run.image_shape)
    except UserError as e:
        raise in_section(section, e, (field.name for field in fields(Sampling))) from None


class Generated(NamedTuple):
    """A batch of samples, the same on every process."""

    images: jax.Array  # uint8 [N, H, W, C], or clips [N, T, H, W, C]
    condition: Condition  # arrays [N, ...]


Generate = Callable[[Mapping[str, Any], int], Iterator[Generated]]


def make_generator(run: Run, options: Sampling, batch_size: int, helpers: Mapping[str, Helper]) -> Generate:
    """Returns `(weights, samples) -> batches` of `batch_size` samples, on every process.

    The last batch may exceed `samples`. Sample i depends only on (sampling seed, i), not on the batch size or
    the devices. Its condition is class i modulo the number of classes or, with `condition_split`, that of the
    split's example i modulo its size. The function compiles when it is first called.

    Raises:
        NotFinite: from the returned function, if an image is not finite.
        UserError: for options that do not fit the run, or batches that the mesh does not divide.
    """
    sampler_of(options, diffusion_of("sampling", run), run)  # raises for this run's own `condition_dropout`
    generate_batch = _make_generate_batch(run, options, batch_size)

    def _generate(weights: Mapping[str, Any], samples: int) -> Iterator[Generated]:
        starts = range(0, samples, batch_size)
        batches = _condition_batches(run, options, batch_size, len(starts))
        for start, batch in zip(starts, batches, strict=False):
            first = jnp.asarray(start, jnp.int32)
            generated, bad = generate_batch(weights["params"], dict(helpers), first, batch)
            if int(bad):
                raise NotFinite(f"samples: {int(bad)} of {batch_size} are not finite, from number {start} on")
            yield generated

    return _generate


@shared_by_runs
def _make_generate_batch(run: Run, options: Sampling, batch_size: int) -> Callable[..., Any]:
    """Returns a compiled function (params, helpers, first index, batch) -> (Generated, count).

    The batch holds the columns of the examples whose conditions the samples take; it is empty where they are
    the classes in turn. The count [] is that of images that are not finite.
    """
    objective = diffusion_of("sampling", run)
    sampler = sampler_of(options, objective, run)
    batch_sharding = sharding.batch_sharding(run.mesh, batch_size, "batch_size")
    classes = run.info.num_classes

    def generate_batch(
        params: Any, helpers: Mapping[str, Helper], start: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[Generated, jax.Array]:
        indices = start + jnp.arange(batch_size, dtype=jnp.int32)  # [N]
        indices = jax.lax.with_sharding_constraint(indices, batch_sharding)
        condition = objective.conditioning.of(batch or {"label": indices % classes}, helpers)
        samples = sampler(params, indices, condition)
        images = autoencoder.decode(run, helpers, samples, options.decode_tile)  # [N, ..., C]
        finite = jnp.isfinite(images).all(axis=tuple(range(1, images.ndim)))  # as uint8 others would be black
        return Generated(to_uint8(images), condition), (~finite).sum()

    return tracing.jit_replicated(run.mesh, generate_batch)


def _condition_batches(
    run: Run, options: Sampling, batch_size: int, count: int
) -> Iterable[Mapping[str, jax.Array]]:
    """Returns the batches of examples whose conditions samples take; empty ones for classes in turn."""
    if not options.condition_split:
        return repeat({}, count)
    place = sharding.batch_sharding(run.mesh, batch_size, "batch_size")
    return cyclic_batches(run.config.data, options.condition_split, batch_size, place, count)
