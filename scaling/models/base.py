"""The type of a family of models, and what a model may offer beside its forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax

from scaling.models.roles import Part
from scaling.models.variants import Variant

M = TypeVar("M", bound=nn.Module)
Params = Mapping[str, Any]
Resized = tuple[dict[str, Any], list[str]]


def _as_they_are(variables: Mapping[str, Any], old: nn.Module, new: nn.Module) -> Resized:
    return dict(variables), []


def _all_of_source(params: Params, source: Params) -> dict[str, Any]:
    return dict(source)


@dataclass(frozen=True, kw_only=True)
class Family(Generic[M]):
    """A family of models: one module, whose sizes have names."""

    module: type[M]
    sizes: Mapping[str, Any]  # sizes by name, as the paper's table gives them
    variants: tuple[Variant, ...]  # the registered variants, each with the options that tell it apart
    roles: Part  # roles of the models' parameters

    # `make(variant, **options)` -> the model; options override its fields.
    make: Callable[..., M]

    # `inputs(variant, **options)` -> the model's arguments by name, with a leading batch of 1.
    inputs: Callable[..., dict[str, jax.ShapeDtypeStruct]]

    # `resized(variables, old, new)` -> the variables of the model `old` for `new`, which differs in
    # resolution or length alone, and a message for each table that was resized. By default none has to be.
    resized: Callable[[Mapping[str, Any], M, M], Resized] = _as_they_are

    # `fit_heads(params, source)` -> the parameters `source` of another model of the family, with heads for
    # the tasks of the model whose fresh parameters are `params`. By default, all of `source`.
    fit_heads: Callable[[Params, Params], dict[str, Any]] = _all_of_source

    # `from_vit(model, params, vit, vit_params)` -> the fresh `params` of `model`, with what a trained ViT has
    # for it. None where a model cannot start from a ViT.
    from_vit: Callable[[M, Params, Any, Params], dict[str, Any]] | None = None


@runtime_checkable
class HasTokens(Protocol):
    """A model that works on tokens."""

    def tokens(self, shape: Sequence[int]) -> int | None:
        """Returns the number of tokens of an input of this shape."""
        ...


@runtime_checkable
class HasMoments(Protocol):
    """An autoencoder, whose posterior over latents has a mean and a log-variance."""

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and log-variance of the posterior of x [B, H, W, C]: twice [B, h, w, Z]."""
        ...


@runtime_checkable
class HasImageFeatures(Protocol):
    """A model with a tower for images and one for texts."""

    def image_features(self, x: jax.Array) -> jax.Array:
        """Returns the embeddings of images [B, H, W, C]: [B, E]."""
        ...
