"""What several formats share: that a model and a config are of the one form, and tables of other sizes."""

import jax
import numpy as np
import pytest

from scaling import models
from scaling.convert import FORMATS, foreign, layouts
from scaling.convert.diffusers import dit as diffusers_dit
from scaling.convert.huggingface import resnet as huggingface_resnet
from scaling.convert.huggingface import vit as huggingface_vit
from scaling.convert.torchvision import resnet as torchvision_resnet
from scaling.errors import UserError
from scaling.models.dit import DiT
from scaling.models.resnet import ResNet
from scaling.models.vit import ViT
from tests.support.running import KEY, named


@pytest.mark.parametrize(
    ("table", "model", "message"),
    [
        (
            huggingface_vit.table,
            ViT(pool="mean"),
            "model.pool=mean: must be token, the only one in this format",
        ),
        (huggingface_resnet.table, ResNet(stem="3x3"), "model.stem=3x3: must be 7x7"),
        (torchvision_resnet.table, ResNet(stem="3x3"), "model.stem=3x3: must be 7x7"),
        (diffusers_dit.table, DiT(block="adaln"), "model.block=adaln: must be adaln-zero"),
        (diffusers_dit.table, DiT(qk_norm=True), "model.qk_norm=True: must be False"),
        (diffusers_dit.table, DiT(mlp_ratio=2.0), r"model.mlp_ratio=2\.0: must be 4\.0"),
    ],
)
def test_a_model_without_an_outside_form_is_named(table: object, model: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        table(model)  # type: ignore[operator]


def test_a_config_may_leave_out_what_is_usual_and_not_say_otherwise() -> None:
    foreign.require("vit", {"act": "gelu", "other": 1}, {"act": "gelu", "bias": True})
    with pytest.raises(UserError, match="bias=None: the family vit has True and no other"):
        foreign.require("vit", {"act": "gelu", "bias": None}, {"act": "gelu", "bias": True})


def test_the_resolution_of_a_table() -> None:
    model = ViT(patch=4, resolution=(8, 12))

    def found(*shape: int) -> ViT:
        return layouts.with_resolution(model, np.zeros(shape), 4)

    assert found(1, 1 + 6, 16) is found(1 + 6, 16) is model
    assert found(1 + 9, 16) == model.clone(resolution=12)
    for broken in ((), (3,), (1, 0, 16), (1, 1, 16)):  # its shape is refused later, by name
        assert found(*broken) is model


def test_transformers_labels() -> None:
    assert layouts.labels(2) == {
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    }


@pytest.mark.parametrize(
    ("family", "variant"), [("vit", "B/16"), ("vivit", "B/16x2"), ("timesformer", "B/16"), ("vilt", "B/32")]
)
def test_a_config_has_the_width_of_the_models_mlp(family: str, variant: str) -> None:
    """56 * (61 / 56) is a little less than 61."""
    options = {"width": 56, "depth": 1, "heads": 7, "mlp_ratio": 61 / 56}
    model, inputs = models.make(family, variant, **options), models.inputs(family, variant, **options)
    variables = jax.eval_shape(model.init, KEY, **inputs)
    assert named(variables["params"])["blocks/mlp/up/kernel"].shape == (1, 56, 61)
    assert (
        FORMATS["huggingface"].families[family].config_file.config(model, inputs)["intermediate_size"] == 61
    )
