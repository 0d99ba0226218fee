"""What the tensors in DeepSpeed's files hold of the model, read off the live engine.

Files and their keys: runtime/engine.py (`_save_checkpoint`, `_save_moe_checkpoint`), runtime/pipe/module.py
(`save_state_dict`), and `state_dict` of the optimizers in runtime/. `param_slice_mappings`, which DeepSpeed saves for
the same purpose, is not used: with `round_robin_gradients` it names other parameters than lie there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import PipelineModule

from roll_ckpt.backends.deepspeed.model_index import Model, model_of, shape_of
from roll_ckpt.backends.deepspeed.optimizer_index import Named, optimizer_meanings
from roll_ckpt.backends.deepspeed.version import DS_AUTOEP_UC_META
from roll_ckpt.formats.tensor_index.meanings import (
    PARAMETER,
    UNKNOWN,
    ByName,
    FileTensors,
    Meanings,
    Region,
    Run,
    Runs,
    Stored,
    Told,
    cut,
    whole,
)

MODEL_ONLY_FILE = "pytorch_model.bin"

_EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt")


class EngineIndex:
    """What the tensors in the files of one engine are. What follows from the engine's structure is kept."""

    def __init__(self) -> None:
        self._modules: list[torch.nn.Module] = []
        self._structure: list[Any] = []
        self._parameters: dict[str, dict[str, Any]] = {}
        self._meanings: dict[str, Meanings] = {}
        self._told: dict[str, FileTensors] = {}

    def look(self, engine: Any) -> Mapping[str, Mapping[str, Any]]:
        """Take notice of the engine's model and optimizer before a save. Returns names, dtypes and shapes of its
        parameters, the same object as long as nothing changes."""
        now = _structure(engine, self._modules)
        if any(was != found for was, found in zip_longest(self._structure, now)):
            self._modules = list(engine.module.modules())
            self._structure = list(_structure(engine, self._modules))
            self._parameters = parameters_of(engine)
            self._meanings = _meanings(engine)
            self._told = {}
        return self._parameters

    def of_file(self, file: str, tensors: tuple[Stored, ...]) -> FileTensors:
        """What the tensors of `file` are, by its name alone."""
        told = self._told.get(file)
        if told is None or told.tensors is not tensors:
            told = self._told[file] = FileTensors(tensors, self._of(file))
        return told

    def _of(self, file: str) -> Meanings:
        if _EXPERT_FILE.fullmatch(file):
            return self._meanings.get("experts", UNKNOWN)
        return self._meanings.get(file, self._meanings.get("", UNKNOWN))


def parameters_of(engine: Any) -> dict[str, dict[str, Any]]:
    """Name, dtype and global shape of every parameter of the engine's module on this rank."""
    return {
        name: {"dtype": str(parameter.dtype).removeprefix("torch."), "shape": list(shape_of(parameter))}
        for name, parameter in engine.module.named_parameters()
    }


def _structure(engine: Any, modules: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """What everything here follows from; torch's own walk over names takes twice as long."""
    yield id(engine.module), id(engine.optimizer)
    for module in modules:
        yield [*map(id, module._modules.values())]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield key, id(parameter), parameter.dtype, shape_of(parameter)


def _meanings(engine: Any) -> dict[str, Meanings]:
    """By the name of a file; "experts" for the files of single experts, "" for all that are not named."""
    model = model_of(engine)
    named, states = optimizer_meanings(engine, model)
    plain: Named = {}
    for name, parameter in model.named():
        runs = model.runs(name, parameter)
        plain[model.name_of(name)] = PARAMETER, Runs.of(runs)
        if hasattr(parameter, DS_AUTOEP_UC_META):
            plain |= _single_experts(runs)
        named[f"module.{name}"] = named[f"frozen_param_fragments.{name}"] = plain[model.name_of(name)]
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: what is gathered there is in the shares of the ranks, too
            named[f"module.{name}"] = PARAMETER, Runs.of(replace(run, replica=True) for run in runs)
            named[f"frozen_param_fragments.{name}"] = PARAMETER, _share(runs, parameter)
    found: dict[str, Meanings] = {"": ByName(named, states), "experts": ByName(plain), MODEL_ONLY_FILE: ByName(plain)}
    if isinstance(engine.module, PipelineModule):
        found |= {file: ByName(layer) for file, layer in _layers(engine.module, model)}
    return found


def _single_experts(runs: Iterable[Run]) -> Iterator[tuple[str, Told]]:
    """AutoEP keeps a rank's experts in one tensor, and saves each in a file of its own under its number."""
    for run in runs:
        _, *inner = run.region.shape
        first, *_ = run.region.offsets or (0,)
        for expert in range(first, first + run.region.extent[0]):
            box = Region.box(run.region.name, run.region.shape, (expert, *(0 for _ in inner)), (1, *inner))
            yield f"{box.name}.{expert}", (PARAMETER, Runs.of(whole(box, run.replica)))


def _layers(module: PipelineModule, model: Model) -> Iterator[tuple[str, Named]]:
    """The file of each layer of a pipeline's stage, whose keys are those of the layer by itself."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for place, layer in enumerate(module.forward_funcs):
        if isinstance(layer, torch.nn.Module):
            named = {
                key: (PARAMETER, Runs.of(model.runs(names[id(parameter)], parameter)))
                for key, parameter in layer.named_parameters(remove_duplicate=False)
            }
            yield Path(module.ckpt_layer_path("", place)).name, named


def _share(runs: Iterable[Run], parameter: Any) -> Runs:
    """What this rank has of a parameter under ZeRO-3: an equal share, the last ones padded."""
    numel, rank = parameter.ds_tensor.ds_numel, dist.get_rank(parameter.ds_process_group)
    return Runs.of(cut(runs, rank * numel, min(parameter.ds_numel, (rank + 1) * numel), 0))
