"""What switches roll_ckpt on in processes that do not import it, and what is said where that cannot be done.

These tests need `roll_ckpt.pth` in site-packages, where `pip install` puts it, `-e` included.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT, environment

from roll_ckpt.activation import startup, variable
from roll_ckpt.errors import ConfigError

OURS = "RollCheckpointEngine"
STOCK = "TorchCheckpointEngine"
NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}}


def case(environment: dict[str, str], section: Any = None, **more: Any) -> dict[str, Any]:
    return {"environment": environment, "section": section, **more}


CASES: dict[str, tuple[dict[str, Any], str | None, list[str], list[str]]] = {
    # name: (case, checkpoint engine or None for an error, what is told once, what is not told)
    "off": (case({}), STOCK, [], ["roll_ckpt"]),
    "0": (case({"ROLL_CKPT": "0"}), STOCK, [], ["roll_ckpt"]),
    "empty": (case({"ROLL_CKPT": " "}), STOCK, [], ["roll_ckpt"]),
    "1": (
        case({"ROLL_CKPT": "1"}),
        OURS,
        [],
        ["saves as stock", "does NOT save"],
    ),
    "json": (case({"ROLL_CKPT": '{"async_save": true, "cluster": "actor"}'}), OURS, [], []),
    "section alone": (case({}, {}, twice=True), STOCK, ["nothing has switched roll_ckpt on"], []),
    "section and 0": (case({"ROLL_CKPT": "0"}, {}), STOCK, ["nothing has switched roll_ckpt on"], []),
    "import alone": (
        case({}, before="import roll_ckpt.deepspeed"),
        STOCK,
        ["this engine saves as stock DeepSpeed"],
        [],
    ),
    "import and section": (case({}, {}, before="import roll_ckpt.deepspeed"), OURS, [], ["nothing has switched"]),
    "import and variable": (case({"ROLL_CKPT": "1"}, before="import roll_ckpt.deepspeed"), OURS, [], []),
    "section and 1": (case({"ROLL_CKPT": "1"}, {"async_save": True}), OURS, [], []),
    "other keys": (
        case({"ROLL_CKPT": '{"staging": {"check": "full"}}'}, {"staging": {"arena_bytes": "64MiB"}}),
        OURS,
        [],
        [],
    ),
    "same value": (case({"ROLL_CKPT": '{"save_total_limit": 2}'}, {"max_ckpt_to_keep": 2}), OURS, [], []),
    "mixture": (
        case({"ROLL_CKPT": '{"async_save": true}'}, {"async_save": False}),
        None,
        ["ConfigError: checkpoint.roll_ckpt in the DeepSpeed config sets async_save to false"],
        [],
    ),
    "mixture inside": (
        case({"ROLL_CKPT": '{"io": {"threads": 3}}'}, {"io": {"threads": 4}}),
        None,
        ["sets io.threads to 4, the environment variable ROLL_CKPT to 3"],
        [],
    ),
    "unknown key": (case({"ROLL_CKPT": '{"asyncsave": true}'}), None, ["did you mean 'async_save'?"], []),
    "not JSON": (case({"ROLL_CKPT": "{async_save: true}"}), None, ["ROLL_CKPT is not JSON"], []),
    "no such file": (case({"ROLL_CKPT": "/nowhere/roll.yaml"}), None, ["/nowhere/roll.yaml cannot be read"], []),
    "neither": (case({"ROLL_CKPT": "true"}), None, ["give 1, 0 for off, settings as JSON"], []),
    "refused feature": (case({"ROLL_CKPT": "1"}, config=NVME), None, ["does not support NVMe offload"], []),
    "optional, unknown key": (
        case({"ROLL_CKPT": '{"asyncsave": 1}', "ROLL_CKPT_OPTIONAL": "1"}),
        STOCK,
        ["does NOT save through roll_ckpt"],
        ["Traceback"],
    ),
    "optional, section": (
        case({"ROLL_CKPT": "no", "ROLL_CKPT_OPTIONAL": "1"}, {}, before="import roll_ckpt.deepspeed"),
        STOCK,
        ["does NOT save through roll_ckpt"],
        ["Traceback"],
    ),
    "optional and fine": (case({"ROLL_CKPT": "1", "ROLL_CKPT_OPTIONAL": "1"}), OURS, [], ["does NOT save"]),
}


IN_SHORT = ("off", "1", "json", "section alone", "import and section", "other keys", "unknown key", "mixture")
IN_SHORT += ("optional, unknown key",)
"""The cases that `make test` has; the others are kinds of them, for `make test-long`."""

Results = Callable[[bool], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the short cases (True) or of the others, which one process tries one after another."""

    @functools.cache
    def results(short: bool) -> dict[str, dict[str, Any]]:
        names = [name for name in CASES if (name in IN_SHORT) == short]
        folder = tmp_path_factory.mktemp("activation")
        (folder / "cases.json").write_text(json.dumps([CASES[name][0] for name in names]))
        script = str(ROOT / "tests" / "activation_cases.py")
        command = [sys.executable, script, str(folder / "results.json"), str(folder / "cases.json")]
        subprocess.run(command, env=clean(), check=True, timeout=600)
        return dict(zip(names, json.loads((folder / "results.json").read_text()), strict=True))

    return results


def clean(**more: str) -> dict[str, str]:
    names = ("ROLL_CKPT", "ROLL_CKPT_OPTIONAL", "ROLL_CKPT_RUN")
    return {**{key: given for key, given in environment().items() if key not in names}, **more}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_SHORT else pytest.mark.long) for name in CASES]
)
def test_an_engine_saves_through_us_or_says_why_not(results_of: Results, name: str) -> None:
    _, engine, told, untold = CASES[name]
    found = results_of(name in IN_SHORT)[name]
    assert (found["engine"], bool(found["error"])) == (engine, engine is None), found["output"]
    output = found["output"]
    for text in told:
        assert output.count(text) == 1, output
    assert not [text for text in untold if text in output], output
    assert output.count("checkpoints go through roll_ckpt") == (engine == OURS), output


def test_the_line_at_the_start_says_with_what(results_of: Results) -> None:
    results = results_of(True)
    line = next(line for line in results["json"]["output"].splitlines() if "go through roll_ckpt" in line)
    for part in ("INFO", "cluster actor", "DeepSpeed 0.", "ZeRO-0", "asynchronous saves", "MiB", "by ROLL_CKPT"):
        assert part in line
    assert "synchronous saves" in results["1"]["output"]


def test_settings_of_section_and_variable_are_taken_together(results_of: Results) -> None:
    staging = results_of(True)["other keys"]["settings"]["staging"]
    assert (staging["check"], staging["arena_bytes"]) == ("full", 64 << 20)


# --- the variable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [("s.json", '{"async_save": true}'), ("s.yaml", "async_save: true"), ("s.yml", '{"async_save": true}')],
)
def test_the_variable_may_name_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.setenv("ROLL_CKPT", str(tmp_path / name))
    settings, shared = variable.settings(), variable.shared_settings()
    assert settings is not None and shared is not None and settings.async_save and shared.async_save


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"async_save": true, "async_save": false}', "stands there 2 times"),
        ('{"async_save": "perhaps"}', "ROLL_CKPT: async_save"),
        ('{"cluter": "a"}', "did you mean 'cluster'"),
        ("[1]", "give 1, 0 for off, settings as JSON"),
        ('{"a": ' * 100_000, "is not JSON"),
        ("{file}", "expected a mapping"),
        ("{folder}", "cannot be read"),
    ],
)
def test_bad_input_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    text = {"{file}": str(tmp_path / "list.yaml"), "{folder}": str(tmp_path)}.get(text, text)
    monkeypatch.setenv("ROLL_CKPT", text)
    with pytest.raises(ConfigError, match=message):
        variable.settings()


def test_megatron_gets_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLL_CKPT", '{"cluster": "actor", "save_total_limit": 3}')
    shared = variable.shared_settings()
    assert shared is not None and shared.max_ckpt_to_keep == 3


# --- every Python process ------------------------------------------------------------------------------------


def test_the_pth_file_holds_the_text_of_startup() -> None:
    line = Path(sysconfig.get_path("purelib"), "roll_ckpt.pth").read_text()
    assert repr(Path(startup.__file__).read_text()) in line, "install the package again: pip install -e ."


@pytest.mark.parametrize("value", ["", "1", "{nonsense", "/nowhere"])
@pytest.mark.parametrize("flags", [[], ["-I"]], ids=["plain", "isolated"])
def test_a_python_process_notices_nothing(value: str, flags: list[str]) -> None:
    code = (
        "import sys; print([m for m in sys.modules if m.split('.')[0] in ('roll_ckpt', 'torch')], len(sys.meta_path))"
    )
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], env=clean(ROLL_CKPT=value), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout[:2]) == (0, "", "[]")


FINDS = """
import importlib.util, sys
finders = [f for f in sys.meta_path if getattr(f, "__name__", "") == "RollCkptFinder"]
assert len(finders) == 1, sys.meta_path
spec = importlib.util.find_spec("deepspeed")
assert spec.origin.endswith("deepspeed/__init__.py") and "deepspeed" not in sys.modules
assert spec.loader.get_filename("deepspeed") == spec.origin and spec.loader.is_package("deepspeed")
import roll_ckpt.activation.startup
assert len([f for f in sys.meta_path if getattr(f, "__name__", "") == "RollCkptFinder"]) == 1
assert not {"torch", "pydantic", "numpy"} & set(sys.modules)
"""


def test_a_look_for_deepspeed_imports_nothing() -> None:
    subprocess.run([sys.executable, "-c", FINDS], env=clean(ROLL_CKPT="1"), check=True)


def test_what_runs_at_each_start_takes_less_than_a_millisecond() -> None:
    timing = "import time; t = time.perf_counter(); exec(text, {'__name__': 'x'}); print(time.perf_counter() - t)"
    code = f"import sys; text = open({startup.__file__!r}).read(); {timing}"
    runs = [subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True) for _ in range(9)]
    assert min(float(run.stdout) for run in runs) < 1e-3


MEGATRON = """
import megatron_cpu, torch
megatron_cpu.install()
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
from megatron.core import parallel_state
parallel_state.initialize_model_parallel()
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
print("ours", hasattr(TorchDistSaveShardedStrategy.async_save, "_roll_ckpt_behind"))
"""


@pytest.mark.parametrize(
    ("value", "ours", "says"),
    [
        (
            "1",
            "ours True",
            "every torch_dist checkpoint of Megatron-core in this process: checkpoints go through roll_ckpt",
        ),
        pytest.param("", "ours False", "", marks=pytest.mark.long),
        pytest.param('{"staging": {"arena_bytes": "1MiB"}}', "", "ConfigError", marks=pytest.mark.long),
    ],
)
def test_the_variable_switches_megatron_on_before_training_begins(value: str, ours: str, says: str) -> None:
    env = clean(ROLL_CKPT=value, LOCAL_WORLD_SIZE="64", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "examples")]))
    done = subprocess.run([sys.executable, "-c", MEGATRON], env=env, capture_output=True, text=True, timeout=300)
    assert ours in done.stdout and says in done.stderr, done.stdout + done.stderr


# --- launchers -----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import deepspeed, torch
deepspeed.init_distributed("gloo")
net = torch.nn.Linear(4, 4)
optimizer = {{"type": "AdamW", "params": {{"torch_adam": True}}}}
config = {{"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer{more}}}
engine = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]
print("engine", type(engine.checkpoint_engine).__name__, sys.argv[1:], flush=True)
"""
SECTION = ', "checkpoint": {"roll_ckpt": {}}'


def launch(command: list[str], folder: Path, more: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(SCRIPT.format(more=more))
    env = clean(**variables)
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=600)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.long
@pytest.mark.parametrize("value", ["1", ""])
def test_the_variable_alone_reaches_the_ranks_of_torchrun(tmp_path: Path, value: str) -> None:
    done = launch([*TORCHRUN, "train.py", "--flag"], tmp_path, ROLL_CKPT=value)
    assert done.stdout.count(f"engine {OURS if value else STOCK} ['--flag']") == 2, done.stderr
    assert done.stderr.count("checkpoints go through roll_ckpt") == (1 if value else 0), done.stderr


@pytest.mark.long
def test_the_reason_is_given_whichever_rank_ends_first_and_no_rank_trains(tmp_path: Path) -> None:
    done = launch([*TORCHRUN, "train.py"], tmp_path, ROLL_CKPT='{"asyncsave": true}')
    assert done.returncode != 0 and "engine" not in done.stdout
    assert "ConfigError: ROLL_CKPT: asyncsave: unknown key; did you mean 'async_save'?" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("local_rank", [[], ["--no_local_rank"]])
@pytest.mark.parametrize("script", [["train.py"], ["-m", "train"]], ids=["script", "module"])
def test_run_under_the_launcher_of_deepspeed(tmp_path: Path, local_rank: list[str], script: list[str]) -> None:
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", *local_rank]
    done = launch([*deepspeed, "--module", "roll_ckpt.run", *script, "--flag"], tmp_path, SECTION)
    arguments = ["--flag"] if local_rank else ["--local_rank=0", "--flag"]
    assert f"engine {OURS} {arguments}" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "script_gets"),
    [
        (["--local_rank=0", "s.py", "a"], ["--local_rank=0", "a"]),
        (["--local-rank=1", "s.py"], ["--local-rank=1"]),
        (["--local_rank", "2", "s.py"], ["--local_rank", "2"]),
        (["s.py", "--local_rank=0"], ["--local_rank=0"]),
        (["--local_rank=0", "-m", "s", "a"], ["--local_rank=0", "a"]),
    ],
)
def test_run_gives_the_script_what_the_launcher_put_first(
    tmp_path: Path, given: list[str], script_gets: list[str]
) -> None:
    (tmp_path / "s.py").write_text("import sys, os; print(sys.argv[1:], os.environ['ROLL_CKPT_RUN'], __name__)")
    command = [sys.executable, "-m", "roll_ckpt.run", *given]
    done = subprocess.run(command, env=clean(), cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{script_gets} 1 __main__\n", done.stderr


@pytest.mark.long
def test_run_around_a_program_that_starts_the_ranks_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "roll_ckpt.run", *TORCHRUN[1:], "train.py"]
    done = launch(command, tmp_path, SECTION)
    assert done.stdout.count(f"engine {OURS}") == 2, done.stderr


@pytest.mark.long
def test_wheel_and_editable_install_bring_the_pth_file_and_take_it_away(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    env = clean(PYTHONPATH=sysconfig.get_path("purelib"), ROLL_CKPT_CUDA="0")
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(copy)], check=True)
    for how in (["-e", str(copy)], [str(copy)]):
        pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", *how]
        subprocess.run(pip, check=True, env={**env, "PIP_IGNORE_INSTALLED": "1"})
        assert (site / "roll_ckpt.pth").is_file()
        found = "import sys; print([f.__name__ for f in sys.meta_path if f.__class__ is type])"
        told = subprocess.run(
            [python, "-c", found], env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
        )
        assert "RollCkptFinder" in told.stdout
        subprocess.run(
            [python, "-m", "pip", "uninstall", "-q", "-y", "roll-ckpt"], check=True, env=clean(PYTHONPATH="")
        )
        assert not (site / "roll_ckpt.pth").exists()
