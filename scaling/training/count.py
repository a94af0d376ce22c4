"""`python -m scaling.training.count`: counts configs that were not trained, for rooms that are free of jax.

It reads a JSON list of the arguments of `count`, and writes a list of its answers, or {"error": text}.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax

from scaling import data
from scaling.errors import UserError
from scaling.run.build import build, described_run, made_for
from scaling.run.cost import run_cost
from scaling.run.options import Config
from scaling.training import config


def count(
    source: str, overrides: Mapping[str, Any], base: Mapping[str, Any] | None = None, run: str | None = None
) -> dict[str, Any]:
    """Counts one config.

    Args:
        source: the config file.
        overrides: of its values.
        base: the overrides with which the study's runs were made.
        run: the folder of a trained run, whose data are taken where the config's are not on this machine.

    Returns:
        `params`, `gmacs`, `tokens`, `examples` and `train_flops` (of the whole training), and `config`, the
        config with the overrides of `base` as nested dicts.

    Raises:
        UserError: if the config is wrong, or nothing says what its data are.
    """
    cfg = config.load(source, overrides)
    built = build(cfg, devices=jax.devices()[:1], info=_info(cfg, run))
    cost, steps = run_cost(built), built.steps
    return {
        **{name: cost[name] for name in ("params", "gmacs", "tokens")},
        "examples": steps * cfg.data.batch_size,
        "train_flops": (cost["train_flops_per_step"] or 0) * steps,
        "config": dict(config.load(source, base or {}).raw),
    }


def _info(cfg: Config, run: str | None) -> data.Info:
    try:
        return data.info(cfg.data)
    except UserError:
        if run is None:
            return made_for(cfg)
        return described_run(run).info


def main() -> None:
    """Answers the requests on stdin, on the CPU: the accelerators are for the runs."""
    jax.config.update("jax_platforms", "cpu")
    answers: list[dict[str, Any]] = []
    for request in json.load(sys.stdin):
        try:
            answers.append(count(**request))
        except UserError as e:
            answers.append({"error": str(e)})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
