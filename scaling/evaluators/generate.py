"""Generation of images with a run's weights, for evaluators and `scaling sample`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from scaling.errors import NotFinite, UserError
from scaling.evaluators import autoencoder
from scaling.objectives.diffusion import Diffusion
from scaling.parallel import sharding, tracing
from scaling.run.build import Run, shared_by_runs
from scaling.sampling import Sampler, Sampling, make_sampler, to_uint8


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
        UserError: if they ask for tiles of latents, and the samples are pixels.
    """
    if options.decode_tile is not None and run.info.latents is None:
        raise UserError(
            f"{section}.decode_tile={options.decode_tile}: this run's samples are pixels; leave it out"
        )
    return make_sampler(options, objective, run.image_shape)


@shared_by_runs
def _generator(
    run: Run, options: Sampling, decode: autoencoder.Decoder, batch_size: int
) -> Callable[..., Any]:
    """Returns a function (params, decoder's params, first index) -> images uint8 [batch_size, H, W, C].

    It also returns how many images are not finite, [].
    """
    sampler = sampler_of(options, diffusion_of("sampling", run), run)
    batch_sharding = sharding.batch_sharding(run.mesh, batch_size, "batch_size")
    classes = run.info.num_classes

    def generate_batch(params: Any, weights: Any, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        indices = start + jnp.arange(batch_size, dtype=jnp.int32)  # [N]
        indices = jax.lax.with_sharding_constraint(indices, batch_sharding)
        samples = sampler(params, indices, indices % classes)
        images = decode(weights, samples, options.decode_tile)  # [N, H, W, C]
        bad = (~jnp.isfinite(images).all(axis=(1, 2, 3))).sum()  # as uint8 they would be black
        return to_uint8(images), bad

    return tracing.jit_replicated(run.mesh, generate_batch)


def generate(
    run: Run, weights: Mapping[str, Any], options: Sampling, samples: int, batch_size: int
) -> Iterator[jax.Array]:
    """Yields batches of images uint8 [batch_size, H, W, C], on every process; the last may exceed `samples`.

    Image i depends only on (sampling seed, i), not on the batch size or the devices.

    Raises:
        NotFinite: if the model generates an image that is not finite.
    """
    sampler_of(options, diffusion_of("sampling", run), run)  # raises for this run's own `label_dropout`
    decoder = autoencoder.decoder(run)
    generate_batch = _generator(run, options, dataclasses.replace(decoder, params=None), batch_size)
    for start in range(0, samples, batch_size):
        images, bad = generate_batch(weights["params"], decoder.params, jnp.asarray(start, jnp.int32))
        if int(bad):
            raise NotFinite(f"samples: {int(bad)} of {batch_size} are not finite, from number {start} on")
        yield images
