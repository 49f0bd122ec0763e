"""The language model or models that a crosscoder was trained on, as a configuration names them, from what its run of `train` records."""

from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.run_reference import Named

Values = dict[str, Any]


def models_of(trained: Named) -> Values:
    """The setting `language_model`, or `language_models` where there are several; on which device is left to the machine.

    From the stream that it was trained on, the held-out text it was measured on, or the records of the activation set.
    Raises `UserError` where none of them tells.
    """
    values = trained.record.config_values()
    activations, held_out = values.get("activations") or {}, values.get("held_out") or {}
    for group in (activations, held_out):
        if several := group.get("language_models"):
            return {"language_models": {name: _anywhere(model) for name, model in several.items()}}
        if one := group.get("language_model"):
            return {"language_model": _anywhere(one)}
    found = _of_activation_set(Path(str(activations.get("path"))))
    if found is None:
        raise UserError(
            f"{trained.reference} does not tell which language model it was trained on, and its activations tell of none; "
            "say language_model.model=NAME, or language_models={a: {model: NAME}, ...}"
        )
    return {"language_model": found}


def _anywhere(model: Values) -> Values:
    return {key: value for key, value in model.items() if key != "device"}


def _of_activation_set(directory: Path) -> Values | None:
    if not (directory / records.MANIFEST).is_file():
        return None
    manifest = records.read_manifest(directory)
    if manifest.get("language_models"):  # their hashes, by name: what they are called elsewhere is not recorded
        return None
    stems = manifest["shards"]
    name = records.read_json(directory / f"{stems[0]}.json").get("provenance", {}).get("language_model") if stems else None
    return None if name is None else {"model": name, "dtype": manifest["dtype"]}
