"""The language model that a crosscoder was trained on, as a configuration names it: found from what its run of `train` records."""

from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.run_reference import Named

Values = dict[str, Any]


def language_model_of(trained: Named) -> Values:
    """The values of `language_model` for a stage that uses the crosscoder; on which device is left to the machine.

    From the stream that it was trained on, the held-out text it was measured on, or the records of the activation set.
    Raises `UserError` where none of them tells.
    """
    values = trained.record.config_values()
    activations, held_out = values.get("activations") or {}, values.get("held_out") or {}
    if activations.get("language_models") or held_out.get("language_models"):
        raise UserError(f"{trained.reference} reads several language models, and a text can be written only with a crosscoder of one yet")
    found = activations.get("language_model") or held_out.get("language_model")
    found = found or _of_activation_set(Path(str(activations.get("path"))))
    if found is None:
        raise UserError(
            f"{trained.reference} does not tell which language model it was trained on, and its activations are not there any more; "
            "say language_model.model=NAME"
        )
    return {key: value for key, value in found.items() if key != "device"}


def _of_activation_set(directory: Path) -> Values | None:
    if not (directory / records.MANIFEST).is_file():
        return None
    manifest = records.read_manifest(directory)
    stems = manifest["shards"]
    name = records.read_json(directory / f"{stems[0]}.json").get("provenance", {}).get("language_model") if stems else None
    return None if name is None else {"model": name, "dtype": manifest["dtype"]}
