"""Frozen helpers: models of other runs that a run uses, and neither trains nor saves.

A config names them in `helpers`, by what the objective or the model calls them; each is a run folder, of a
trained run or of imported weights. The autoencoder of a run on latents is one too, which `latents.json`
names. They are sharded over the run's mesh like its own arrays, and `config.json` records their digests.
"""

from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.objectives.base import Helper
from scaling.run.build import AUTOENCODER, Run, helper_place
from scaling.run.folder import read_description
from scaling.run.restore import restore_run, weights_digest


class RunHelpers:
    """The helpers of a run, each restored when it is first asked for.

    `folder` is the run's own folder, whose `config.json` knows the digests of the helpers it began with.
    """

    def __init__(self, run: Run, folder: Path | None = None) -> None:
        self.run = run
        self._recorded = ((read_description(folder) if folder else None) or {}).get("helpers") or {}
        self._loaded: dict[str, tuple[Helper, dict[str, Any]]] = {}

    def named(self) -> dict[str, Helper]:
        """Returns those that the config names, which losses may read."""
        return {name: self.load(name) for name in self.run.config.helpers}

    def all(self) -> dict[str, Helper]:
        """Returns all of them, with the autoencoder of latents."""
        latents = [AUTOENCODER] if self.run.info.latents is not None else []
        return {name: self.load(name) for name in [*self.run.config.helpers, *latents]}

    def description(self) -> dict[str, dict[str, Any]]:
        """Returns {name: {"run", "step", "digest"}} of those that were restored, and of those on record."""
        return {**self._recorded, **{name: entry for name, (_, entry) in self._loaded.items()}}

    def load(self, name: str) -> Helper:
        """Returns a helper.

        Raises:
            UserError: if its run is missing, or its weights are not those that this run began with.
        """
        if name not in self._loaded:
            self._loaded[name] = self._restore(name, *helper_place(self.run, name))
        return self._loaded[name][0]

    def _restore(self, name: str, folder: str, key: str) -> tuple[Helper, dict[str, Any]]:
        try:
            restored = restore_run(folder, self.run.mesh)
        except UserError as e:
            raise UserError(f"{key}: {e}") from None
        variables = {"params": restored.weights["params"], **restored.weights["collections"]}
        digest = weights_digest({**variables["params"], **restored.weights["collections"]})
        latents = self.run.info.latents
        if name == AUTOENCODER and latents is not None and digest != latents.weights:
            raise UserError(f"{key} {folder} has changed since; encode again, into another folder")
        before = self._recorded.get(name, {}).get("digest", digest)
        if digest != before:
            raise UserError(
                f"{key}: its weights have changed since this run began (digest {digest}, not {before}); put "
                "the former ones back, or train into another folder"
            )
        entry = {"run": str(folder), "step": restored.step, "digest": digest}
        return Helper(variables, restored.run.model), entry
