"""Muon: steps of matrices that are orthogonal, by the roles of parameters.

Momentum is orthogonalised by Newton and Schulz's iteration (Jordan et al. 2024), each layer of a stack by
itself, all dimensions that a matrix multiplies being its rows and all that it makes its columns. Steps are
scaled to the size of AdamW's, 0.2 sqrt(max(rows, columns)), so that both share a rate and a weight decay (Liu
et al. 2025, arXiv:2502.16982, eq. 4).
"""

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from scaling import models
from scaling.parallel.sharding import path_of

LIKE_ADAMW = 0.2  # root mean square of AdamW's steps


def scale_by_muon() -> optax.GradientTransformation:
    """Returns the transform from gradients of matrices to directions."""
    orthogonal = optax.contrib.scale_by_muon(weight_dimension_numbers=_every_dimensions)

    def rescale(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, x: x * _scale(path_of(keys), x.shape), updates)

    return optax.chain(orthogonal, optax.stateless(rescale))


def _every_dimensions(updates: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, _: dimensions(path_of(keys)), updates)


def dimensions(path: str) -> MuonDimensionNumbers:
    """Returns the rows and columns of the matrix at a path; a dimension of layers is neither.

    Raises:
        UserError: if the parameter has no role.
    """
    return MuonDimensionNumbers(*map(tuple, _axes(path)))


def _axes(path: str) -> tuple[range, range]:
    role = models.role_of(path)
    first = int(role.stacked)
    middle = first + len(role.fan_in)
    return range(first, middle), range(middle, len(role.dims))


def _scale(path: str, shape: tuple[int, ...]) -> float:
    return LIKE_ADAMW * math.sqrt(max(math.prod(shape[i] for i in axes) for axes in _axes(path)))
