"""The cache stage: any number of tasks, any kill, one and the same activation set."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from rounding import forward_pass
from tiny_models import tiny_gpt2, tiny_token_set

from pipeline import records
from pipeline.activations.shard_file import ShardFileWriter
from pipeline.activations.shards import ActivationSet
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.load import load
from pipeline.config.site_file import Site
from pipeline.contexts import Contexts
from pipeline.language_model import LanguageModel
from pipeline.run import Run, Stopped, byte_size
from pipeline.stages import cache_activations
from pipeline.tokens import TokenSet

CPU = torch.device("cpu")
LAYERS = ["transformer.h.0", "transformer.h.1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    tiny_gpt2(directory / "model")
    tiny_token_set(directory / "tokens")
    return directory


def cache_config(inputs, output, **changes):
    language_model = {"model": str(inputs / "model"), "dtype": changes.pop("dtype", "float32"), "device": "cpu"}
    settings = {"layers": LAYERS, "context_tokens": 16, "contexts_per_generation": 12, "model_batch_contexts": 5} | changes
    return CacheConfig(name="test", tokens=inputs / "tokens", output=output, language_model=language_model, **settings)


def cache(config, tmp_path, *, task=0, num_tasks=1):
    return cache_activations.run(config, Run(tmp_path / "run" / str(task), stage="cache", task=task, num_tasks=num_tasks))


def contents(directory):
    """Every file's bytes; of records, what counts: all but their provenance."""
    out = {}
    for path in sorted(directory.iterdir()):
        record = records.read_json(path) if path.suffix == ".json" else None
        out[path.name] = path.read_bytes() if record is None else {k: v for k, v in record.items() if k != "provenance"}
    return out


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return cache(cache_config(inputs, directory / "set"), directory), directory / "set"


def reference_rows(inputs, *, drop=(0,)):
    """Every kept position the slow way, one context at a time: (document, position, token) to activations, by context."""
    model = LanguageModel.load(cache_config(inputs, inputs).language_model)
    contexts = Contexts(TokenSet.open(inputs / "tokens"), 16)
    rows = []
    for number, length in enumerate(contexts.lengths.tolist()):
        batch = contexts.read(np.array([number]))
        acts_SLD = model.activations(torch.from_numpy(batch.tokens_BS[:, :length]), LAYERS)[0]
        for position in range(length):
            if position not in drop:
                where = (int(batch.documents_BS[0, position]), position, int(batch.tokens_BS[0, position]))
                rows.append((where, acts_SLD[position]))
    return rows


def rows_on_disk(directory):
    batches = list(ActivationSet.open(directory, CPU).batches(batch_positions=50, epoch=0, cursor=0))
    acts = torch.cat([batch.acts_BLD for batch in batches])
    columns = [torch.cat([getattr(batch, f) for batch in batches]).tolist() for f in ("documents_B", "positions_B", "tokens_B")]
    return list(zip(zip(*columns, strict=True), acts, strict=True))


def test_every_kept_position_is_written_once_with_its_own_activations(inputs, finished):
    expected, found = reference_rows(inputs), rows_on_disk(finished[1])
    assert sorted(where for where, _ in found) == sorted(where for where, _ in expected)
    # The same (document, position, token) can occur twice, so rows are matched by place and nearest activation.
    by_place = {}
    for where, acts in expected:
        by_place.setdefault(where, []).append(acts)
    for where, acts in found:
        nearest = min(range(len(by_place[where])), key=lambda i: float((by_place[where][i] - acts).abs().max()))
        # Alone and in batches, so in float32 alike but for the order of sums; activations are at most about 1.
        torch.testing.assert_close(acts, by_place[where].pop(nearest), rtol=0, atol=forward_pass(context_tokens=16))


def test_statistics_are_those_of_all_rows(finished):
    acts = torch.stack([acts for _, acts in rows_on_disk(finished[1])]).double()
    statistics = ActivationSet.open(finished[1], CPU).statistics
    assert statistics.num_positions == len(acts)
    torch.testing.assert_close(statistics.mean_LD, acts.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.mean_squared_norm_L, acts.square().sum(-1).mean(0), rtol=1e-12, atol=0)
    centered = (acts - acts.mean(0)).square().sum(-1).mean(0)
    # A difference of float64 sums of some 200 positions that are at most 1,000 times as large as it.
    torch.testing.assert_close(statistics.mean_squared_centered_norm_L, centered, rtol=1e-9, atol=0)
    scale = torch.tensor(records.read_manifest(finished[1])["scale"])
    # The scale is a float32: rounded once, squared.
    torch.testing.assert_close((scale.double() ** 2 * centered), torch.full((2,), 16.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_rows_are_shuffled_within_a_shard(finished):
    documents = [where[0] for where, _ in rows_on_disk(finished[1])]
    unchanged = sum(a == b for a, b in itertools.pairwise(documents)) / len(documents)
    assert unchanged < 0.4  # unshuffled, neighbours share their document nine times in ten


@pytest.mark.parametrize("num_tasks", [2, 3, 7])
def test_any_number_of_tasks_gives_the_same_bytes(inputs, finished, tmp_path, num_tasks):
    config = cache_config(inputs, tmp_path / "set")
    results = [cache(config, tmp_path, task=task, num_tasks=num_tasks) for task in reversed(range(num_tasks))]
    assert [result["complete"] for result in results[:1] + results[-1:]] == [False, True]
    assert contents(tmp_path / "set") == contents(finished[1])


def test_the_plain_safetensors_library_reads_a_shard_and_its_data_are_aligned(finished):
    path = finished[1] / "000001.safetensors"
    record = records.read_json(finished[1] / "000001.json")
    tensors = safetensors.torch.load_file(path)
    rows = record["num_positions"]
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "act": ((rows, 2, 16), torch.float32),
        "document": ((rows,), torch.uint32),
        "token": ((rows,), torch.uint16),
        "position": ((rows,), torch.uint16),
    }
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert header_bytes % 4096 == 0
    mapped = np.memmap(path, np.float32, mode="r", offset=header_bytes, shape=(rows, 2, 16))
    assert (mapped == tensors["act"].numpy()).all()
    assert records.verify(finished[1]) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_stored_as_they_are_computed(inputs, tmp_path, dtype):
    cache(cache_config(inputs, tmp_path / "set", dtype=dtype, max_tokens=100), tmp_path)
    batch = next(iter(ActivationSet.open(tmp_path / "set", CPU).batches(batch_positions=100, epoch=0, cursor=0)))
    assert batch.acts_BLD.dtype == getattr(torch, dtype)
    stored = safetensors.torch.load_file(tmp_path / "set" / "000000.safetensors")["act"]
    assert sorted(batch.acts_BLD.flatten(1).tolist()) == sorted(stored.flatten(1).tolist())


@pytest.mark.parametrize("max_tokens", [2, 15, 16, 100, 180, 181])
def test_max_tokens_is_the_number_of_positions_written(inputs, tmp_path, max_tokens):
    result = cache(cache_config(inputs, tmp_path / "set", max_tokens=max_tokens), tmp_path)
    assert result["positions"] == max_tokens == len(rows_on_disk(tmp_path / "set"))


def test_activations_that_do_not_vary_have_no_scale(inputs, tmp_path):
    with pytest.raises(UserError, match=r"activations of transformer\.h\.0 are the same at all of its 1 positions"):
        cache(cache_config(inputs, tmp_path / "set", max_tokens=1), tmp_path)


def test_a_shorter_set_is_the_beginning_of_a_longer_one(inputs, finished, tmp_path):
    first = records.read_json(finished[1] / "000000.json")["num_positions"]
    cache(cache_config(inputs, tmp_path / "set", max_tokens=first), tmp_path)
    assert (tmp_path / "set" / "000000.safetensors").read_bytes() == (finished[1] / "000000.safetensors").read_bytes()


def test_no_position_is_dropped_when_none_is_to_be(inputs, tmp_path):
    result = cache(cache_config(inputs, tmp_path / "set", drop_positions=[]), tmp_path)
    tokens = TokenSet.open(inputs / "tokens")
    assert result["positions"] == tokens.num_tokens + tokens.num_documents


def test_any_positions_can_be_dropped(inputs, tmp_path):
    cache(cache_config(inputs, tmp_path / "set", drop_positions=[3, 0, 15]), tmp_path)
    expected = sorted(where for where, _ in reference_rows(inputs, drop=(0, 3, 15)))
    assert sorted(where for where, _ in rows_on_disk(tmp_path / "set")) == expected


def test_a_killed_run_started_again_ends_with_the_same_bytes(inputs, finished, tmp_path):
    config = cache_config(inputs, tmp_path / "set")
    program = textwrap.dedent("""
        import json, sys, pathlib, time
        from pipeline.config.cache_activations import CacheConfig
        from pipeline.activations.shard_file import ShardFileWriter
        from pipeline.run import Run
        from pipeline.stages import cache_activations
        append = ShardFileWriter.append
        def slow_append(self, rows):
            append(self, rows)
            self._file.flush()
            time.sleep(0.05)
        ShardFileWriter.append = slow_append
        cache_activations.run(CacheConfig.model_validate(json.loads(sys.argv[1])), Run(pathlib.Path(sys.argv[2]), stage="cache"))
    """)
    command = [sys.executable, "-c", program, json.dumps(config.resolved()), str(tmp_path / "run")]
    # Killed while the third shard's data are half written.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not list((tmp_path / "set").glob(".000002.safetensors.*.tmp")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    left = {path.name for path in (tmp_path / "set").iterdir()}
    assert {"000001.json", "000001.safetensors"} < left
    assert not left & {"000002.json", "000002.safetensors", "manifest.json"}
    committed = (tmp_path / "set" / "000001.json").stat().st_mtime_ns
    cache(config, tmp_path)
    assert contents(tmp_path / "set") == contents(finished[1])
    assert (tmp_path / "set" / "000001.json").stat().st_mtime_ns == committed  # what was finished is not done again


@pytest.mark.parametrize("missing", [
    ["manifest.json"],
    ["manifest.json", "000005.json"],
    ["manifest.json", "000003.json", "000004.json", "000004.safetensors"],
    ["manifest.json", *(f"00000{number}.{ending}" for number in range(6) for ending in ("json", "safetensors"))],
], ids=["before-the-manifest", "before-a-record", "amid-two-tasks", "after-the-recipe"])  # fmt: skip
def test_a_kill_between_any_two_files_is_made_good(inputs, finished, tmp_path, missing):
    shutil.copytree(finished[1], tmp_path / "set")
    for name in missing:
        (tmp_path / "set" / name).unlink()
    if len(missing) > 1:
        (tmp_path / "set" / f".{missing[-1].partition('.')[0]}.safetensors.elsewhere.17.tmp").write_bytes(b"half")
    cache(cache_config(inputs, tmp_path / "set"), tmp_path)
    assert contents(tmp_path / "set") == contents(finished[1])


def test_a_stop_keeps_the_shards_that_are_committed(inputs, finished, tmp_path, monkeypatch):
    run = Run(tmp_path / "run", stage="cache")
    commit = records.commit_shard

    def commit_then_stop(*args):
        if not run.stop_reason:
            commit(*args)
        run.request_stop("time is up")

    monkeypatch.setattr(records, "commit_shard", commit_then_stop)
    config = cache_config(inputs, tmp_path / "set")
    with pytest.raises(Stopped, match="time is up"):
        cache_activations.run(config, run)
    assert [path.name for path in sorted((tmp_path / "set").iterdir())] == ["000000.json", "000000.safetensors", "recipe.json"]
    monkeypatch.undo()
    cache(config, tmp_path)
    assert contents(tmp_path / "set") == contents(finished[1])


def test_a_disk_too_small_is_refused_before_anything_is_computed(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: namedtuple("Usage", "free")(free=70_000_000))
    big = cache_config(inputs, tmp_path / "set")
    cache(big, tmp_path)  # 64 MiB spare and a few hundred kB of data fit into 70 MB
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: namedtuple("Usage", "free")(free=1_000_000))
    with pytest.raises(UserError, match=r"needs 6\d\.\d+ MB more, but its disk has 1 MB free.*max_tokens"):
        cache(cache_config(inputs, tmp_path / "other"), tmp_path)
    assert not list((tmp_path / "other").glob("*.safetensors"))
    capsys.readouterr()


def test_a_disk_that_fills_up_loses_nothing_that_was_written(inputs, finished, tmp_path, monkeypatch):
    append = ShardFileWriter.append

    def append_or_fail(self, rows):
        if (tmp_path / "set" / "000001.json").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows)

    monkeypatch.setattr(ShardFileWriter, "append", append_or_fail)
    config = cache_config(inputs, tmp_path / "set")
    with pytest.raises(UserError, match=r"000002\.safetensors could not be written: no space left on device; free some space"):
        cache(config, tmp_path)
    left = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert left == ["000000.json", "000000.safetensors", "000001.json", "000001.safetensors", "recipe.json"]
    monkeypatch.undo()
    cache(config, tmp_path)
    assert contents(tmp_path / "set") == contents(finished[1])


def test_the_settings_are_read_from_yaml(inputs, tmp_path):
    path = tmp_path / "cache.yaml"
    path.write_text(
        f"stage: cache\nname: demo\ntokens: {inputs}/tokens\noutput: '{{ssd}}/activations/demo'\nmax_tokens: 1e9\n"
        "layers: [transformer.h.7, transformer.h.8]\nlanguage_model:\n  model: gpt2\n  dtype: bfloat16\n"
    )
    config = load(path, [], Site(ssd=tmp_path / "ssd"))
    assert isinstance(config, CacheConfig)
    assert (config.context_tokens, config.drop_positions, config.max_tokens) == (1024, [0], 1_000_000_000)
    assert config.outputs() == {"activations": tmp_path / "ssd" / "activations" / "demo"}
    assert not {"tokens", "output", "name", "resources"} & set(config.identity())
    with pytest.raises(UserError, match=r"language_model\.dtyp is not a setting; did you mean `dtype`"):
        load(path, ["language_model.dtyp=float16"], Site())
    with pytest.raises(UserError, match=r"layers is .*: an entry stands twice"):
        load(path, ["layers=[a, a]"], Site())


def test_only_what_is_still_missing_counts_as_needed(inputs, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[1], tmp_path / "set")
    for path in (tmp_path / "set").glob("000001.*"):
        path.unlink()
    missing = (finished[1] / "000001.safetensors").stat().st_size
    cache(cache_config(inputs, tmp_path / "set"), tmp_path)
    assert f"{byte_size(missing)} needed in" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: namedtuple("Usage", "free")(free=0))
    cache(cache_config(inputs, tmp_path / "set"), tmp_path)  # nothing is missing, so a full disk does not matter


def test_other_settings_are_refused_in_the_same_directory(inputs, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "set")
    with pytest.raises(UserError, match=r"made with other settings: settings\.seed was 0, now it is 1"):
        cache(cache_config(inputs, tmp_path / "set", seed=1), tmp_path)


def test_a_shard_cut_short_is_found_before_the_work_starts(inputs, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "set")
    os.truncate(tmp_path / "set" / "000001.safetensors", 5000)
    with pytest.raises(UserError, match=r"000001\.safetensors holds 5,000 bytes, its record says .* delete .*000001\.json"):
        cache(cache_config(inputs, tmp_path / "set"), tmp_path)


def test_activations_that_are_not_finite_are_refused(tmp_path, inputs):
    shutil.copytree(inputs / "tokens", tmp_path / "tokens")
    model = LanguageModel.load(cache_config(inputs, tmp_path).language_model)
    model.model.transformer.wpe.weight.data[10] = float("nan")  # beyond the few tokens on which a model is tried out
    model.model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"activations of transformer\.h\.\d are not finite .* in context \d+, position \d+, document \d+"):
        cache(cache_config(tmp_path, tmp_path / "set"), tmp_path)
    assert not list((tmp_path / "set").glob("*.safetensors"))
