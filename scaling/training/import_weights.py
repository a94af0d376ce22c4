"""Makes a run of imported weights; `scaling train` with the same config continues from them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.run import build, state
from scaling.run.checkpoint import Checkpoints
from scaling.run.folder import RunFolder, read_status
from scaling.training import loop
from scaling.training.resuming import IMPORTING


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
        out: the folder to create, or that of an import that was cut off.
        origin: where the weights are from, for `status.json`.
        imported: a description of the checkpoint for `config.json`, with the config's keys that it "set".

    Raises:
        UserError: if `out` cannot be written.
    """
    collections = {name: tree for name, tree in variables.items() if name != "params"}
    initial = state.init_from(run, variables["params"], collections)
    with RunFolder(out) as folder:
        folder.status(IMPORTING)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of an import that was cut off
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(0, initial, {"step": 0, "data_position": 0, "config": run.config.raw})
        folder.steps = run.steps
        loop.write_config(folder, run, imported)
        folder.status("done", f"weights of {origin}")


def was_cut_off(out: Path) -> bool:
    """Returns whether a folder holds an import that was not finished, or nothing yet."""
    if not out.is_dir():
        return False
    names = {path.name for path in out.iterdir()}
    begun = (read_status(out) or {}).get("status") == IMPORTING
    return begun or all(name == "lock" or name.startswith(".status.json.") for name in names)
