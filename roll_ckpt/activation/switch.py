"""Installs roll_ckpt in a framework once it is imported, and holds training up where that has failed.

What goes wrong is kept until training begins, because many processes import a framework and never train: launchers,
reports, checks for what is installed. In DeepSpeed training begins with an engine, in Megatron-core with its groups
of ranks; a wrapper there, the gate, raises what was kept.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import roll_ckpt
from roll_ckpt.activation import variable
from roll_ckpt.disk import witness
from roll_ckpt.errors import ConfigError, RollCkptError, UnsupportedError

DEEPSPEED, MEGATRON = "deepspeed", "megatron.core"
FRAMEWORKS = {DEEPSPEED: "DeepSpeed", MEGATRON: "Megatron-core"}

RUN = "ROLL_CKPT_RUN"
"""Set by `roll_ckpt.run` for the processes that its script starts: they install us, and a section switches us on."""

log = logging.getLogger("roll_ckpt")

_imported: set[str] = set()
"""The frameworks whose public module was imported, `roll_ckpt.deepspeed` or `roll_ckpt.megatron`."""
_tried: dict[str, tuple[str, RollCkptError | None]] = {}
"""For each framework, the variable's value when we were installed, and why that failed; None if it did not."""
_told: set[tuple[str, str]] = set()


def install(framework: str) -> None:
    """Import `framework` and install roll_ckpt in it: what `import roll_ckpt.deepspeed` does. May be called again.

    Raises:
        ImportError: the framework is not installed.
        ConfigError: ROLL_CKPT cannot be used.
        UnsupportedError: this version of the framework lacks what roll_ckpt needs.
        With ROLL_CKPT_OPTIONAL=1 the last two are a warning.
    """
    _imported.add(framework)
    importlib.import_module(framework)
    imported(framework)
    _refuse(framework, _installed(framework))


def run() -> None:
    """Install roll_ckpt in each framework that this process and its children import: what `roll_ckpt.run` does."""
    os.environ[RUN] = "1"
    importlib.import_module("roll_ckpt.activation.startup")
    for framework in FRAMEWORKS:
        if framework in sys.modules:
            imported(framework)


def imported(framework: str) -> None:
    """Called when the code of `framework` has run. Never raises for what the gate will tell."""
    asked = _asked(framework)
    if asked and not _backend_is_importing(framework):  # or else the gate does it
        _installed(framework)
    # Also where nobody has asked for us: the variable may come later, and a section without us gets a warning.
    if framework == DEEPSPEED:
        _gate_engines()
    else:
        _gate_megatron(importing=asked)


def _asked(framework: str) -> bool:
    return variable.is_on() or os.environ.get(RUN) == "1" or framework in _imported


def _backend_is_importing(framework: str) -> bool:
    """Whether it is our backend that imports the framework, and so cannot be used yet: the gate installs it."""
    prefix = f"roll_ckpt.backends.{framework.partition('.')[0]}."
    ours = [module for name, module in sys.modules.items() if name.startswith(prefix)]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in ours)


def _installed(framework: str) -> RollCkptError | None:
    """Install us, unless that was tried with what ROLL_CKPT says now; the reason why it failed, or None."""
    asked_with = variable.value()
    if framework not in _tried or _tried[framework][0] != asked_with:
        problem: RollCkptError | None = None
        try:
            _INSTALL[framework]()
        except (ConfigError, UnsupportedError) as error:
            problem = error
        except Exception as error:  # an import of ours failed, for example
            problem = UnsupportedError(
                f"roll_ckpt {roll_ckpt.__version__} cannot be installed in this {FRAMEWORKS[framework]}: "
                f"{type(error).__name__}: {error}"
            )
            problem.__cause__ = error
        witness.tell("refused" if problem else "installed", framework=framework, why=str(problem or ""))
        _tried[framework] = asked_with, problem
    return _tried[framework][1]


def _install_in_deepspeed() -> None:
    settings = variable.settings()
    from roll_ckpt.backends.deepspeed import section
    from roll_ckpt.backends.deepspeed.install import install

    install()
    section.use_variable(settings)


def _install_in_megatron() -> None:
    settings = variable.shared_settings()
    from roll_ckpt.backends.megatron import requirement

    requirement.check()
    from roll_ckpt.backends.megatron.install import install

    by = variable.NAME if variable.is_on() else "roll_ckpt.run"
    install(settings, switched_on_by="import roll_ckpt.megatron" if MEGATRON in _imported else by)


_INSTALL: dict[str, Callable[[], None]] = {DEEPSPEED: _install_in_deepspeed, MEGATRON: _install_in_megatron}


# --- the gate ------------------------------------------------------------------------------------------------

_GATE = "_roll_ckpt_gate"

_MEGATRON_BEGINS = (
    ("megatron.core.parallel_state", "initialize_model_parallel"),
    ("megatron.core.dist_checkpointing.serialization", "save"),
    ("megatron.core.dist_checkpointing", "save"),
)
"""Functions of which a training calls one before it trains, or at the latest before it writes a checkpoint."""


def _gate_engines() -> None:
    engine = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    if engine is not None:
        early = "_do_sanity_check"  # a version may lack it, which is told when an engine is made
        _gate(engine, early if hasattr(engine, early) else "__init__", _engine_begins)


def _gate_megatron(importing: bool) -> None:
    """Without `importing` only what Megatron-core has imported itself is gated."""
    for module, function in _MEGATRON_BEGINS:
        try:
            owner = importlib.import_module(module) if importing else sys.modules.get(module)
        except Exception:  # nobody can train or save with it: they get its own error
            continue
        if hasattr(owner, function):
            _gate(owner, function, _megatron_begins)


def _gate(owner: Any, name: str, begins: Callable[..., None]) -> None:
    """Call `begins` with the arguments of `owner.name` before it, if no gate of ours is there already."""
    function = getattr(owner, name)
    links = [function]
    while hasattr(links[-1], "__wrapped__"):
        links.append(links[-1].__wrapped__)
    if any(_GATE in getattr(link, "__dict__", {}) for link in links):
        return

    @functools.wraps(function)
    def gate(*args: Any, **kwargs: Any) -> Any:
        before = getattr(owner, name)
        begins(*args, **kwargs)
        now = getattr(owner, name)
        return (function if now is before else now)(*args, **kwargs)  # `begins` may have wrapped it

    setattr(gate, _GATE, True)
    setattr(owner, name, gate)


def _engine_begins(engine: Any, *_: Any, **__: Any) -> None:
    if _asked(DEEPSPEED) or DEEPSPEED in _tried:  # a notebook may have unset the variable since
        _refuse(DEEPSPEED, _installed(DEEPSPEED))
    else:
        _warn_of_section(engine)


def _megatron_begins(*_: Any, **__: Any) -> None:
    if _asked(MEGATRON):
        _refuse(MEGATRON, _installed(MEGATRON) or _begun_in_megatron())


def _begun_in_megatron() -> RollCkptError | None:
    from roll_ckpt.backends import start
    from roll_ckpt.backends.megatron import install as hook

    try:
        hook.begin()
    except RollCkptError as problem:
        if start.is_optional():
            hook.leave_to_stock()
        return problem
    return None


def _refuse(framework: str, problem: RollCkptError | None) -> None:
    """Raise `problem` if there is one; with ROLL_CKPT_OPTIONAL=1 warn, once."""
    from roll_ckpt.backends import start

    if problem is None or (start.is_optional() and (framework, str(problem)) in _told):
        return
    _told.add((framework, str(problem)))
    start.leave_to_stock(problem, FRAMEWORKS[framework], "this process")


_SERVING = ("roll_ckpt.backends.deepspeed.install", "roll_ckpt.pipeline.base")
"""Modules of which one is there if the engine can still be attached to us, or is."""


def _warn_of_section(engine: Any) -> None:
    """Warn on rank 0, once, if the engine's config has our section and nothing has installed us."""
    config = getattr(getattr(engine, "_config", None), "_param_dict", None)
    checkpoint = config.get("checkpoint") if isinstance(config, dict) else None
    has_section = isinstance(checkpoint, dict) and checkpoint.get("roll_ckpt") is not None
    if not has_section or (DEEPSPEED, "section") in _told or any(name in sys.modules for name in _SERVING):
        return
    from roll_ckpt.backends import start

    _told.add((DEEPSPEED, "section"))
    if start.rank() == 0:
        log.warning(
            "checkpoint.roll_ckpt stands in the DeepSpeed config, but nothing has switched roll_ckpt on in this "
            "process: its checkpoints are stock DeepSpeed's. Set ROLL_CKPT=1 in the environment, or "
            "`import roll_ckpt.deepspeed` before deepspeed.initialize, or run the script by `-m roll_ckpt.run`"
        )
