"""Makes a run of imported weights; `scaling train` with the same config continues from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.run import build, state
from scaling.run.checkpoint import Checkpoints
from scaling.run.folder import RunFolder
from scaling.training import loop


def create_run_from_weights(
    run: build.Run,
    variables: Mapping[str, Any],
    out: Path,
    origin: str,
    imported: Mapping[str, Any] | None = None,
) -> None:
    """Creates the run folder `out`, with the status "done" and `variables` as the weights of step 0.

    Args:
        run: the run, built from its config.
        variables: {"params": ..., other collections}; parameters that they leave out are initialised as in
            training.
        out: the folder to create.
        origin: where the weights are from, for `status.json`.
        imported: a description of the checkpoint for `config.json`, with the config's keys that it "set".

    Raises:
        UserError: if `out` holds a run already, or cannot be written.
    """
    if (out / "config.json").exists():
        raise UserError(f"out={out}: holds a run; choose another folder, nothing is written over")
    with RunFolder(out) as folder:
        collections = {name: tree for name, tree in variables.items() if name != "params"}
        initial = state.init_from(run, variables["params"], collections)
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(0, initial, {"step": 0, "data_position": 0, "config": run.config.raw})
        folder.steps = run.steps
        loop.write_config(folder, run, imported)
        folder.status("done", f"weights of {origin}")
