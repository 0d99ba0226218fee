"""A tiny GPT under real Megatron-core that trains on CPU and gloo, see examples/megatron_cpu.py.

Import this before `megatron`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from examples.megatron_cpu import install as install

VOCABULARY, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 128, 16, 2, 4


@dataclass
class Tiny:
    """A GPT on this rank with distributed optimizer and scheduler, and what trains it."""

    model: list[Any]
    optimizer: Any
    scheduler: Any
    steps: int = 0

    def train(self, steps: int = 1) -> list[tuple[float, float]]:
        """Loss and gradient norm of each of the next `steps` steps, the same numbers on every rank."""
        return [self._step() for _ in range(steps)]

    def _step(self) -> tuple[float, float]:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        world = parallel_state.get_data_parallel_world_size()
        batches = list(self._batches())
        results = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(batches) for _ in self.model] if len(self.model) > 1 else iter(batches),
            model=self.model,
            num_microbatches=MICRO_BATCHES // world,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        self.steps += 1
        loss = torch.tensor([sum(float(result["loss"]) for result in results) / max(1, len(results))])
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        dist.broadcast(loss, src=dist.get_world_size() - 1)  # the last rank has the last pipeline stage
        return float(loss) / world, float(norm)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        from megatron.core import parallel_state

        generator = torch.Generator().manual_seed(1000 + self.steps)
        tokens = torch.randint(0, VOCABULARY, (MICRO_BATCHES, MICRO_BATCH, SEQUENCE + 1), generator=generator)
        share = MICRO_BATCHES // parallel_state.get_data_parallel_world_size()
        first = parallel_state.get_data_parallel_rank() * share
        for batch in tokens[first : first + share]:
            yield {"tokens": batch[:, :-1].contiguous(), "labels": batch[:, 1:].contiguous()}


def _forward(batches: Iterator[dict[str, torch.Tensor]], model: Any) -> Any:
    batch = next(batches)
    mask = torch.tril(torch.ones(1, 1, SEQUENCE, SEQUENCE)) < 0.5
    positions = torch.arange(SEQUENCE)[None].expand(MICRO_BATCH, -1)
    return model(batch["tokens"], positions, mask, labels=batch["labels"]), _loss


def _loss(output: torch.Tensor) -> Any:
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}  # stock divides the loss in place


def build(
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    *,
    seed: int = 123,
    bf16: bool = False,
    dropout: float = 0.0,
    hidden: int = 32,
    layers: int = 2,
) -> Tiny:
    """A new model over all ranks; what they do not share by `tp` and `pp` is data parallel. With `vpp` each rank has
    that many chunks of the pipeline. Every rank calls."""
    install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    with mock.patch.object(dist, "destroy_process_group"):  # they are made once, see install()
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp, virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        overlap_p2p_comm=vpp > 1,
        batch_p2p_comm=vpp == 1,
        use_cpu_initialization=True,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        attention_dropout=dropout,
        hidden_dropout=dropout,
    )
    grads = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    model = []
    for stage in range(vpp):
        place: Any = {"ignore_virtual": False, "vp_stage": stage} if vpp > 1 else {}
        gpt: Any = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            VOCABULARY,
            SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            vp_stage=stage if vpp > 1 else None,
        )
        model.append(DistributedDataParallel(config, grads, Float16Module(config, gpt) if bf16 else gpt))
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        min_lr=1e-4,
        use_distributed_optimizer=True,
        bf16=bf16,
        params_dtype=dtype,
        clip_grad=1.0,
    )
    optimizer = get_megatron_optimizer(settings, model)
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, 1e-3, 1e-4, 2, 20, "linear", 0.0, 0.1, 20, "linear", use_checkpoint_opt_param_scheduler=True
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in model] if vpp > 1 else model[0].no_sync
    config.grad_scale_func = optimizer.scale_loss
    config.timers = None
    return Tiny(model, optimizer, scheduler)


def model_state(tiny: Tiny, told: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of the model under the names of Megatron's training script."""
    chunks = [chunk.module.sharded_state_dict(metadata=told) for chunk in tiny.model]
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{index}": chunk for index, chunk in enumerate(chunks)}


def _place(part: Any, elements: slice | None) -> tuple[Any, ...]:
    """The shape of a whole tensor, the box of it in which a part lies, its shape, and the elements of it."""
    sizes = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    box = tuple(slice(at, at + size) for at, size in zip(part.global_offset, sizes, strict=True))
    return part.global_shape, box, sizes, slice(None) if elements is None else elements


def gathered(tiny: Tiny, *, moments: bool = True) -> dict[str, torch.Tensor]:
    """Every parameter, main parameter and moment in full, by Megatron's names, in any layout the same; every
    rank calls. A model that never made a step has no moments: Megatron cannot gather it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from roll_ckpt.backends.megatron import version

    form = next(form for form in ("fully_reshardable", "fully_sharded_model_space") if form in version.SHARDING_TYPES)
    kind = {"distrib_optim_sharding_type": form, "chained_optim_avoid_prefix": True}
    state = model_state(tiny, kind)
    if moments:
        state["optimizer"] = tiny.optimizer.sharded_state_dict(state.get("model", dict(state)), metadata=kind)
    apply_factories(state)
    mine = [
        (value.key.replace("fp32_param", "param"), _place(value, version.flattened(value)), value.data.detach().clone())
        for value in nested_values(state)
        if isinstance(value, ShardedTensor) and value.data is not None
    ]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    full: dict[str, torch.Tensor] = {}
    for share in shares:
        for key, (shape, box, box_shape, elements), part in share:
            whole = full.setdefault(key, torch.full(shape, float("nan"), dtype=part.dtype))
            filled = whole[box].clone().reshape(-1)
            filled[elements] = part.reshape(-1)
            whole[box] = filled.reshape(box_shape)
    assert not any(torch.isnan(whole).any() for whole in full.values() if whole.is_floating_point())
    return full
