"""Every setting that cannot be meant is refused by name, with what to write instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roll_ckpt.config import DeepSpeedConfig, HubUpload, PipelineConfig, Section, Settings
from roll_ckpt.errors import ConfigError
from roll_ckpt.save import arena

RUN: dict[str, Any] = {"output_dir": "run", "save_steps": 2, "max_steps": 10}


def refused(section: type[Section], values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        section.parse(values, where="the file")
    assert str(caught.value).startswith("the file: ")
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_the_defaults_are_those_that_are_written_down() -> None:
    config = PipelineConfig.parse(RUN, "here")
    assert config.output_dir == Path("run").absolute() and config.async_save is None
    assert config.commit_timeout_s == config.exit_timeout_s == 600
    assert not config.fail_training and not config.take_over and config.run_id is None
    assert config.max_ckpt_to_keep == 0 and config.resume_from_checkpoint is True
    assert config.staging.arena_bytes is None and config.staging.overlap and config.staging.check == "sample"
    assert config.io.direct and config.io.threads == 2 and config.io.block_bytes == 4 << 20
    assert config.load.allow == () and config.checkpoint_config is None and config.expected_clusters is None
    assert DeepSpeedConfig.parse({}, "here").cluster == "model"


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("asinc_save", True, "async_save"),
        ("commit_timeout", 3, "commit_timeout_s"),
        ("max_ckpt_to_kep", 3, "max_ckpt_to_keep"),
        ("stagin", {}, "staging"),
        ("runid", "x", "run_id"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key: str, value: Any, near: str) -> None:
    message = refused(Settings, {key: value})
    assert f"{key}: unknown key; did you mean {near!r}?" in message


@pytest.mark.parametrize(
    ("values", "key", "near"),
    [
        ({"staging": {"arena_byte": 1}}, "staging.arena_byte", "arena_bytes"),
        ({"io": {"thread": 1}}, "io.thread", "threads"),
        ({"io": {"blok_bytes": 1}}, "io.blok_bytes", "block_bytes"),
        ({"load": {"alow": []}}, "load.alow", "allow"),
    ],
)
def test_an_unknown_nested_key_is_refused_with_the_nearest_of_its_section(
    values: dict[str, Any], key: str, near: str
) -> None:
    assert f"{key}: unknown key; did you mean {near!r}?" in refused(Settings, values)


def test_a_key_of_the_upload_section_is_looked_up_there() -> None:
    upload = {"type": "file_system", "output_dir": "up", "async_uplod": True}
    message = refused(PipelineConfig, {**RUN, "checkpoint_config": upload})
    assert "checkpoint_config.async_uplod: unknown key; did you mean 'async_upload'?" in message


def test_a_key_like_no_other_lists_all_known_ones() -> None:
    message = refused(Settings, {"io": {"zzz": 1}})
    assert "io.zzz: unknown key; known keys are block_bytes, direct, threads" in message


def test_all_wrong_keys_are_told_at_once() -> None:
    message = refused(Settings, {"asinc_save": 1, "commit_timeout_s": -1, "io": {"threads": 0}})
    assert "asinc_save" in message and "commit_timeout_s" in message and "io.threads" in message


def test_keys_of_a_pipeline_are_unknown_to_a_plain_script() -> None:
    assert "save_steps: unknown key" in refused(DeepSpeedConfig, {"save_steps": 3})
    assert "cluster: unknown key" in refused(PipelineConfig, {**RUN, "cluster": "actor"})


@pytest.mark.parametrize("key", ["output_dir", "save_steps", "max_steps"])
def test_a_pipeline_needs_its_directory_and_its_steps(key: str) -> None:
    assert f"{key}: Field required" in refused(PipelineConfig, {k: v for k, v in RUN.items() if k != key})


@pytest.mark.parametrize("name", ["max_ckpt_to_keep", "save_total_limit"])
def test_both_names_of_the_number_to_keep_work(name: str) -> None:
    assert Settings.parse({name: 3}, "here").max_ckpt_to_keep == 3


def test_both_names_of_the_number_to_keep_at_once_are_refused() -> None:
    message = refused(Settings, {"max_ckpt_to_keep": 3, "save_total_limit": 3})
    assert "max_ckpt_to_keep and save_total_limit are one setting" in message


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"max_ckpt_to_keep": -1}, "max_ckpt_to_keep"),
        ({"commit_timeout_s": 0}, "commit_timeout_s"),
        ({"exit_timeout_s": -1}, "exit_timeout_s"),
        ({"async_save": "perhaps"}, "async_save"),
        ({"run_id": 7}, "run_id"),
        ({"io": {"threads": 65}}, "io.threads"),
        ({"io": {"block_bytes": "4 elephants"}}, "io.block_bytes"),
        ({"io": {"block_bytes": "32KiB"}}, "io.block_bytes"),
        ({"staging": {"arena_bytes": "64KiB"}}, "staging.arena_bytes"),
        ({"staging": 3}, "staging"),
        ({"staging": {"check": True}}, "staging.check"),
        ({"load": {"allow": "os.system"}}, "load.allow"),
    ],
)
def test_a_value_that_cannot_be_is_refused_under_its_key(values: dict[str, Any], key: str) -> None:
    assert f"{key}: " in refused(Settings, values)


@pytest.mark.parametrize(("key", "value"), [("save_steps", 0), ("max_steps", 0), ("max_steps", -3)])
def test_steps_are_positive(key: str, value: int) -> None:
    assert f"{key}: " in refused(PipelineConfig, {**RUN, key: value})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4MiB", 4 << 20), ("1 GiB", 1 << 30), ("2MB", 2_000_000), (1 << 21, 1 << 21), ("1.5MiB", 3 << 19)],
)
def test_sizes_may_have_a_unit(text: str | int, nbytes: int) -> None:
    config = Settings.parse({"staging": {"arena_bytes": text}, "io": {"block_bytes": "64KiB"}}, "here")
    assert config.staging.arena_bytes == nbytes and config.io.block_bytes == 64 << 10


def test_a_block_is_a_multiple_of_a_page() -> None:
    message = refused(Settings, {"io": {"block_bytes": (64 << 10) + 512}})
    assert "io.block_bytes is 66048" in message and "4096" in message


def test_an_arena_smaller_than_two_blocks_is_refused_with_both_keys() -> None:
    message = refused(Settings, {"staging": {"arena_bytes": "1MiB"}})
    assert "staging.arena_bytes" in message and "io.block_bytes (4194304)" in message
    assert Settings.parse({"staging": {"arena_bytes": "8MiB"}}, "here").staging.arena_bytes == 8 << 20


def test_the_arena_is_shared_by_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Settings.parse({"staging": {"arena_bytes": "16MiB"}}, "here")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert arena.arena_bytes(config) == 16 << 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert arena.arena_bytes(config) == 8 << 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"staging\.arena_bytes gives each of 4 local ranks 4194304"):
        arena.arena_bytes(config)


def test_the_settings_cannot_be_changed_afterwards() -> None:
    config = Settings.parse({}, "here")
    with pytest.raises(ValueError, match="frozen"):
        config.async_save = True


@pytest.mark.parametrize("values", [None, [], "async_save", 3])
def test_what_is_no_mapping_is_refused(values: object) -> None:
    assert "expected a mapping of settings" in refused(Settings, values)


# ---- rules over several keys


def test_expected_clusters_need_a_run_id() -> None:
    worlds = {**RUN, "expected_clusters": {"actor": 2, "critic": 2}}
    assert "expected_clusters needs run_id" in refused(PipelineConfig, worlds)
    assert "expected_clusters needs run_id" in refused(PipelineConfig, {**worlds, "run_id": ""})
    assert PipelineConfig.parse({**worlds, "run_id": "r"}, "here").expected_clusters == {"actor": 2, "critic": 2}


@pytest.mark.parametrize("there", ["run", "run/up", "./run/a/b", "other/../run/up"])
def test_an_upload_into_the_runs_own_directory_is_refused(there: str) -> None:
    upload = {"type": "file_system", "output_dir": there}
    message = refused(PipelineConfig, {**RUN, "checkpoint_config": upload})
    assert f"checkpoint_config.output_dir {Path(there).absolute()}" in message


def test_an_upload_through_a_link_into_the_runs_own_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    upload = {"type": "file_system", "output_dir": tmp_path / "link" / "up"}
    values = {**RUN, "output_dir": tmp_path / "run", "checkpoint_config": upload}
    assert "give a directory outside it" in refused(PipelineConfig, values)


@pytest.mark.parametrize("there", ["up", "running", "..", "run2/up"])
def test_an_upload_beside_the_run_is_taken(there: str) -> None:
    config = PipelineConfig.parse({**RUN, "checkpoint_config": {"type": "file_system", "output_dir": there}}, "here")
    assert config.checkpoint_config is not None and config.checkpoint_config.async_upload
    assert config.checkpoint_config.output_dir == Path(there).absolute()


def test_the_type_of_an_upload_is_known() -> None:
    message = refused(PipelineConfig, {**RUN, "checkpoint_config": {"type": "s3", "output_dir": "x"}})
    assert "checkpoint_config.type" in message and "file_system" in message
    assert "checkpoint_config.type" in refused(PipelineConfig, {**RUN, "checkpoint_config": {"output_dir": "x"}})


def hub(**more: object) -> dict[str, object]:
    return {**RUN, "checkpoint_config": {"type": "hub", "repo_id": "team/run", **more}}


def test_the_hub_is_private_unless_it_is_said_otherwise() -> None:
    config = PipelineConfig.parse(hub(), "here").checkpoint_config
    assert config == HubUpload(type="hub", repo_id="team/run", private=True, revision="main", async_upload=True)
    assert "checkpoint_config: 'run' cannot be a repository on the Hub" in refused(PipelineConfig, hub(repo_id="run"))
    assert "'../x' cannot be a branch" in refused(PipelineConfig, hub(revision="../x"))
    assert "checkpoint_config.repo_id" in refused(PipelineConfig, {**RUN, "checkpoint_config": {"type": "hub"}})
    message = refused(PipelineConfig, hub(privat=False))
    assert "checkpoint_config.privat: unknown key; did you mean 'private'?" in message
    assert "checkpoint_config.output_dir: unknown key" in refused(PipelineConfig, hub(output_dir="x"))


@pytest.mark.parametrize("key", ["token", "hub_token", "hf_token", "HF_TOKEN", "api_key"])
def test_a_token_is_refused_and_not_repeated(key: str) -> None:
    secret = "hf_" + "Xy7" * 11
    upload = {"type": "file_system", "output_dir": "x", key: secret}
    for values in (hub(**{key: secret}), {**RUN, key: secret}, {**RUN, "checkpoint_config": upload}):
        message = refused(PipelineConfig, values)
        assert key in message and "HF_TOKEN in the environment" in message and secret not in message


@pytest.mark.parametrize(
    ("value", "meant"), [(True, True), (False, False), ("run/checkpoint-3", Path("run/checkpoint-3").absolute())]
)
def test_a_run_resumes_from_the_newest_from_a_path_or_from_nothing(value: Any, meant: Any) -> None:
    config = PipelineConfig.parse({**RUN, "resume_from_checkpoint": value}, "here").resume_from_checkpoint
    assert config == meant and type(config) is type(meant)


# ---- files


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_yaml_is_read_and_keywords_replace_its_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "output_dir: run\nsave_steps: 2\nmax_steps: 10\nio: {block_bytes: 64KiB, threads: 3}\nsave_total_limit: 2\n",
    )
    config = PipelineConfig.from_yaml(path)
    assert (config.save_steps, config.io.block_bytes, config.io.threads, config.max_ckpt_to_keep) == (2, 64 << 10, 3, 2)
    config = PipelineConfig.from_yaml(str(path), save_steps=5, io={"threads": 4}, output_dir=tmp_path)
    assert (config.save_steps, config.io.threads, config.io.block_bytes) == (5, 4, 4 << 20)
    assert config.output_dir == tmp_path


@pytest.mark.parametrize("text", ["off", "'off'"])
def test_a_check_may_be_off_without_quotes(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"output_dir: run\nsave_steps: 2\nmax_steps: 10\nstaging: {{check: {text}}}\n")
    assert PipelineConfig.from_yaml(path).staging.check == "off"


def test_an_override_is_checked_like_the_file_and_named_with_it(tmp_path: Path) -> None:
    path = write(tmp_path, "output_dir: run\nsave_steps: 2\nmax_steps: 10\n")
    with pytest.raises(ConfigError, match="save_stepz: unknown key; did you mean 'save_steps'") as caught:
        PipelineConfig.from_yaml(path, save_stepz=1)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        PipelineConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["a: [1, 2", "\t- x", "a: b: c", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_yaml_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        PipelineConfig.from_yaml(path)
    assert f"{path} is not YAML: " in str(caught.value)


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"output_dir: \xff\xfe\n")
    with pytest.raises(ConfigError) as caught:
        PipelineConfig.from_yaml(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected a mapping of settings at the top level"):
        PipelineConfig.from_yaml(write(tmp_path, text))


def test_an_empty_file_misses_what_a_pipeline_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output_dir: Field required"):
        PipelineConfig.from_yaml(write(tmp_path, ""))
    assert PipelineConfig.from_yaml(tmp_path / "run.yaml", **RUN).save_steps == 2
