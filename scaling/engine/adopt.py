"""Weights from elsewhere as a run: `scaling train` of the same config goes on from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.engine import build, state, train
from scaling.engine.checkpoint import Checkpoints
from scaling.engine.runfolder import RunFolder
from scaling.errors import UserError


def adopt(
    built: build.Built,
    variables: Mapping[str, Any],
    out: Path,
    origin: str,
    imported: Mapping[str, Any] | None = None,
) -> None:
    """Makes the run folder `out`, done, with these variables ({"params": ..., collections}) as its step 0.

    Parameters that `variables` leave out start as training would start them. `origin` is for `status.json`,
    `imported` for `config.json`: what is known of the checkpoint, and which keys it "set" in the config.

    Raises: UserError where `out` holds a run already, or cannot be written.
    """
    if (out / "config.json").exists():
        raise UserError(f"out={out}: holds a run; choose another folder, nothing is written over")
    with RunFolder(out) as folder:
        collections = {name: tree for name, tree in variables.items() if name != "params"}
        adopted = state.with_weights(state.init(built), variables["params"], collections)
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(0, adopted, {"step": 0, "data_position": 0, "config": built.config.raw})
        folder.steps = built.steps
        train.write_config(folder, built, imported)
        folder.status("done", f"weights of {origin}")
