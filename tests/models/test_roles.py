"""Roles of parameters: every parameter of every family has one, stacks are where the loops are."""

import re
from typing import Any

import flax.linen as nn
import jax
import pytest
from jax.sharding import PartitionSpec as P

from scaling import models
from scaling.errors import UserError
from scaling.models.execution import EXECUTION, Execution
from scaling.models.layers import EncoderBlock, stack
from scaling.models.roles import LINEAR, NORM, Blocks, Part, Role, find, merged
from scaling.parallel import sharding
from tests.support.running import named

REGISTERED = [(f, v, o) for f, m in models.MODELS.items() for v, o in m.variants]
# Of each family the last of each kind ("ViT" and "RN", "ADM" and "LDM"): sizes and patches change no name.
KINDS = {(f, *re.findall("RN|ViT|ADM|LDM", v), repr(o)): (f, v, o) for f, v, o in REGISTERED}
HEADS = ("itm", "mlm", "mpp", "vqa", "retrieval")
OPTIONS = [  # what no registered variant has
    ("dit", "S/8", {"qk_norm": True}), ("dit", "S/8", {"block": "in-context"}),
    ("vilt", "B/32", {"tasks": HEADS}), ("vilt", "B/32", {"tasks": ("nlvr2",)}),
    ("clip", "ViT-B/32", {"logit_bias": True, "pre_norm": False}),
]  # fmt: skip


def params_of(family: str, variant: str, **options: Any) -> dict[str, Any]:
    model = models.make(family, variant, **options)
    inputs = models.inputs(family, variant, **options)
    return named(jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"])


def roles_in(part: Part | Role) -> set[tuple[str, ...]]:
    if isinstance(part, Role):
        return {(part.kind, *part.fan_in, "->", *part.fan_out)}
    return set().union(*(roles_in(each) for each in part.names.values()))


def test_every_parameter_has_a_role_and_every_role_a_parameter() -> None:
    used = set()
    for kind in [*KINDS.values(), *OPTIONS]:
        for path, leaf in params_of(*kind[:2], **kind[2]).items():
            role = models.role_of(path)
            assert len(role.dims) == leaf.ndim, path
            assert (role.kind == "matrix") == path.endswith("kernel"), path
            used |= roles_in(role)
    assert used == roles_in(models.ROLES)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("vit", "A/14", {}), ("resnet", "A", {"depths": (1, 3)}), ("swin", "A", {}), ("clip", "RN50", {}),
    ("clip", "ViT-F/16", {}), ("vivit", "P/7x2", {"attention": "factorised-encoder"}), ("dit", "A/14", {}),
    ("vilt", "B/32", {}), ("timesformer", "A/7", {}), ("t5", "Small", {}), ("vae", "small", {}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "variant", "options"), CASES)
def test_the_stacks_are_where_the_loops_are(family: str, variant: str, options: dict[str, Any]) -> None:
    model = models.make(family, variant, **options)
    inputs = models.inputs(family, variant, **options)
    variables = jax.eval_shape(model.init, jax.random.key(0), **inputs)
    loops = set()

    def gather(weights: Any, path: str, depth: int, dtype: Any) -> Any:
        loops.add(path)
        assert "params" not in weights
        return weights

    before = EXECUTION.set(Execution(gather=gather))
    jax.eval_shape(model.apply, variables, **inputs)
    EXECUTION.reset(before)
    assert bool(loops) == (family != "vae")
    for path in named(variables["params"]):
        in_loop = any(path.startswith(f"{loop}/") for loop in loops)
        assert models.role_of(path).stacked == in_loop, path


class Toy(nn.Module):
    """A stack of two blocks, called `name_of_stack`."""

    name_of_stack: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return stack(EncoderBlock(2, name=self.name_of_stack), 2, x)


def test_a_stack_under_another_name_is_an_error() -> None:
    mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"))

    def shard(name: str) -> Any:
        toy, x = Toy(name), jax.ShapeDtypeStruct((1, 4, 256), "float32")
        return sharding.param_shardings(jax.eval_shape(toy.init, jax.random.key(0), x)["params"], mesh)

    assert shard("blocks")["blocks"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", None)
    with pytest.raises(UserError, match=r"parameter layers/\S+: 'layers' has no role; declare it in `roles`"):
        shard("layers")
    message = r"parameter head/kernel: has 3 dimensions, and its role 2 \(in, out\); declare a stack"
    with pytest.raises(UserError, match=message):
        sharding.spec("head/kernel", (2, 64, 64), 4, {"data": 1, "fsdp": 8, "tensor": 1})


def test_unknown_names_are_errors() -> None:
    part = Part({"stage#": Part({"blocks": LINEAR.at(Blocks())})})
    assert find(part, "stage12/blocks/kernel").dims == ("layer", "in", "out")
    with pytest.raises(UserError, match="parameter stage1/blocks/gamma: 'gamma' has no role"):
        find(part, "stage1/blocks/gamma")
    with pytest.raises(UserError, match="parameter stage1/blocks/kernel/more: 'more' has no role"):
        find(part, "stage1/blocks/kernel/more")
    with pytest.raises(UserError, match="parameter stage1/blocks: is a part of a model, kernel, bias; name"):
        find(part, "stage1/blocks")


def test_a_name_has_one_role() -> None:
    both = merged([Part({"a": LINEAR, "b": NORM}), Part({"a": Part({"scale": NORM.names["scale"]})})])
    assert set(both.names) == {"a", "b"} and find(both, "a/scale") == find(both, "a/bias")
    with pytest.raises(ValueError, match=r"a: has two roles, .* give one of them another name"):
        merged([Part({"a": LINEAR}), Part({"a": LINEAR.at("before")})])
