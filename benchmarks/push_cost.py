"""What pushing to the Hub costs the training loop: the same job with and without a push, by turns, in one run.

    python benchmarks/push_cost.py

starts two CPU ranks that train under ZeRO-2 and save asynchronously, and measures the loop from the first save on,
without the last step, which waits for its push by design. Both kinds of run save alike. The Hub is a local one in a
process that gets only the processor time that nobody else wants, as if it were far away; the uploader is ours, as
it is. Prints a table and writes build/push_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "build" / "push_cost.json"
REPO = "bench/push-cost"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024, help="of the model's square layers")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=Path, metavar="DIR", help="be one rank of one run, that saves there")
    parser.add_argument("--push", action="store_true")
    return parser.parse_args()


# --- one rank -----------------------------------------------------------------------------------------------------


def train(arguments: argparse.Namespace) -> None:
    import deepspeed
    import torch

    from roll_ckpt import BasePipeline, Cluster, PipelineConfig

    layers = [torch.nn.Linear(arguments.width, arguments.width) for _ in range(arguments.layers)]
    model = torch.nn.Sequential(*layers)
    engine = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "steps_per_print": 10**9,
        },
    )[0]
    settings = {"output_dir": arguments.rank, "save_steps": arguments.save_steps, "max_steps": arguments.steps}
    hub = {"checkpoint_config": {"type": "hub", "repo_id": REPO}} if arguments.push else {}
    pipeline = BasePipeline(PipelineConfig.parse({**settings, **hub, "exit_timeout_s": 0}, "push_cost.py"))
    pipeline.set_checkpoint_clusters(Cluster("model", engine))
    pipeline.resume()
    began = 0.0
    for step in range(arguments.steps - 1):
        if step == arguments.save_steps:
            torch.distributed.barrier()
            began = time.monotonic()
        engine.backward(engine(torch.randn(1024, arguments.width)).pow(2).mean())
        engine.step()
        pipeline.do_checkpoint(step, is_last_step=False)
    torch.distributed.barrier()
    loop_s = time.monotonic() - began
    if engine.global_rank == 0:
        listing = subprocess.run(
            [sys.executable, "-m", "roll_ckpt", "queue", "ls", str(arguments.rank), "--json"], capture_output=True
        )
        pushed = [entry["nbytes"] for entry in json.loads(listing.stdout)["entries"] if entry["state"] == "done"]
        steps = arguments.steps - 1 - arguments.save_steps
        told = {"loop_s": loop_s, "step_s": loop_s / steps, "pushed": len(pushed), "pushed_bytes": sum(pushed)}
        (arguments.rank.parent / "told.json").write_text(json.dumps(told))
    os._exit(0)  # what is still owed is of no interest here


# --- the comparison -----------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, push: bool, url: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="push_cost_") as folder:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        hub = {"HF_ENDPOINT": url, "HF_TOKEN": "any", "HF_HUB_DISABLE_XET": "1", "HF_HOME": folder}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        command += ["--rank", f"{folder}/run", *(["--push"] if push else [])]
        for name in ("steps", "save_steps", "width", "layers"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        environment = {**os.environ, **hub, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"a run failed:\n{done.stdout}\n{done.stderr}")
        told: dict[str, float] = json.loads(Path(folder, "told.json").read_text())
        return told


def stand_back() -> None:
    """Take what processor time nobody else wants, against other sessions too, which Linux weighs as groups."""
    os.setsid()
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    group = Path("/proc/self/autogroup")
    if group.exists():
        group.write_text("19")


def main() -> None:
    arguments = parse()
    if arguments.rank is not None:
        train(arguments)
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory(prefix="push_cost_hub_") as root:
        serve = [sys.executable, "-m", "roll_ckpt", "hub-dev", "--root", root, "--json"]
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, preexec_fn=stand_back) as hub:
            assert hub.stdout is not None
            url = json.loads(hub.stdout.readline())["url"]
            try:
                run(arguments, True, url)  # warms the page cache
                for number in range(arguments.rounds):
                    for kind in sorted(runs, reverse=bool(number % 2)):
                        runs[kind].append(run(arguments, kind == "with", url))
            finally:
                hub.terminate()
    median = {kind: statistics.median(told["loop_s"] for told in runs[kind]) for kind in runs}
    print(f"{'':>8}  loop, median   fastest to slowest   checkpoints pushed meanwhile")
    for kind, told in runs.items():
        loops = sorted(one["loop_s"] for one in told)
        pushed = f"{sum(one['pushed'] for one in told)} ({sum(one['pushed_bytes'] for one in told) / 1e6:.0f} MB)"
        print(f"{kind:>8}  {median[kind]:10.2f} s   {loops[0]:6.2f} to {loops[-1]:6.2f} s   {pushed:>28}")
    print(f"with a push, the loop takes {median['with'] / median['without'] - 1:+.1%}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"arguments": vars(arguments), "runs": runs}, indent=2, default=str))


if __name__ == "__main__":
    main()
