"""A path means what it meant when it was given: `~` and variables are expanded, and chdir changes nothing."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from megatron_worlds import Worlds
from worlds import World, environment

from roll_ckpt import names, process
from roll_ckpt.config import PipelineConfig, Settings
from roll_ckpt.errors import ConfigError
from roll_ckpt.state import StateSaver


def below(folder: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern))


def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUN_1", "demo")
    for given, meant in {
        "~": "/home/me",
        "~/runs/$RUN_1": "/home/me/runs/demo",
        "/x/${RUN_1}y/$RUN_1": "/x/demoy/demo",
        "~root/x": f"{pwd.getpwnam('root').pw_dir}/x",
        "/x/~/$5/$/${}/a$": "/x/~/$5/$/${}/a$",
        "./~x": f"{os.getcwd()}/~x",
    }.items():
        assert names.absolute(given) == Path(meant)


@pytest.mark.parametrize(("given", "named"), [("/x/$NO_SUCH_1/a", "NO_SUCH_1"), ("${NO_SUCH_2}", "NO_SUCH_2")])
def test_a_variable_that_is_not_set_is_named(given: str, named: str) -> None:
    assert names.expand(given, strict=False) == given
    with pytest.raises(ConfigError, match=f"environment variable {named} is not set"):
        names.absolute(given)
    run = {"output_dir": "x", "save_steps": 1, "max_steps": 2}
    upload = {"type": "file_system", "output_dir": given}
    for more in ({"output_dir": given}, {"checkpoint_config": upload}, {"resume_from_checkpoint": given}):
        with pytest.raises(ConfigError, match=f"environment variable {named} is not set"):
            PipelineConfig.parse({**run, **more}, "here")


def test_the_home_of_no_user_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"write \./~nobody-of-this-name"):
        names.absolute("~nobody-of-this-name/x")
    assert names.expand("~nobody-of-this-name/x", strict=False) == "~nobody-of-this-name/x"


def test_a_pipeline_stays_where_it_began(two_ranks: World, tmp_path: Path) -> None:
    assert two_ranks.call("path_cases:run_a_pipeline", str(tmp_path)) == [[None, None, 1, 2]] * 2
    assert below(tmp_path, "checkpoint-*") == [
        f"runs/{where}/checkpoint-{step}{folder}"
        for where in ("a", "copies")
        for step in (1, 2)
        for folder in ("", f"/actor/checkpoint-{step}")
    ]
    assert not below(tmp_path / "elsewhere", "*.*/*")


def test_a_script_finds_what_it_saved(two_ranks: World, tmp_path: Path) -> None:
    assert None not in two_ranks.call("path_cases:run_a_script", str(tmp_path))[0]
    assert below(tmp_path, "manifest.json") == [
        "$UNKNOWN/scripts/three/manifest.json", "scripts/one/manifest.json", "scripts/two/manifest.json"
    ]  # fmt: skip


def test_a_state_saver_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with process.installed(process.Process()):
        ours = StateSaver(Settings(async_save=True, staging={"arena_bytes": "16MiB"}))  # type: ignore[arg-type]
        saves = [ours.save({"w": torch.ones(4)}, where) for where in ("runs/one", "~/runs/two")]
        monkeypatch.chdir(tmp_path / "elsewhere")
        for save in saves:
            save.wait(60)
        assert torch.equal(ours.load("$HOME/runs/one")["w"], torch.ones(4))
    assert below(tmp_path, "manifest.json") == ["runs/one/manifest.json", "runs/two/manifest.json"]


def test_a_megatron_handle_stays(megatron: Worlds, tmp_path: Path) -> None:
    megatron.at("DP2").call("megatron_save_cases:wander", str(tmp_path))
    assert below(tmp_path, "manifest.json") == ["runs/one/manifest.json", "runs/two/manifest.json"]


def test_the_command_line_expands_what_the_shell_left(tmp_path: Path) -> None:
    runs.history(tmp_path / "run", [1, 2])
    told = environment(HOME=str(tmp_path), RUN="run")

    def cli(*words: str) -> str:
        command = [sys.executable, "-m", "roll_ckpt", *words]
        done = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "checkpoint-2" in cli("ls", "~/$RUN") and "checkpoint-2" in cli("show", "$HOME/run/checkpoint-2")
    assert "would keep checkpoint-1, checkpoint-2" in cli(
        "prune", "~/run", "--keep", "1", "--dry-run", "--upload-dir=~/copies"
    )
    (tmp_path / "~").symlink_to("run")
    assert "checkpoint-2" in cli("ls", "~")  # what is there is meant
