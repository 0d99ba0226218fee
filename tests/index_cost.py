"""What the tensor index costs: bytes, and milliseconds of the save's own thread, with 100,000 tensors on a rank.

    python tests/index_cost.py [tensors]

`longest pause`: how long a thread that wants to run every tenth of a millisecond had to wait at most meanwhile; the
interpreter lets another thread run every 5 ms unless one call in C holds it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from roll_ckpt.formats.image import TensorPiece
from roll_ckpt.formats.tensor_index import reader as tensor_index
from roll_ckpt.formats.tensor_index.meanings import ByName, FileTensors, Region, Run, Runs, whole
from roll_ckpt.formats.tensor_index.writer import Indexer

STATES = ("exp_avg", "exp_avg_sq")


def names(count: int) -> list[str]:
    kinds = (
        "self_attn.q_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.experts.17.down_proj.weight",
        "input_layernorm.weight",
    )
    return [f"model.layers.{at // 4}.{kinds[at % 4]}" for at in range(count)]


def model_file(count: int) -> FileTensors:
    """Each parameter by itself."""
    pieces, named = [], {}
    for at, name in enumerate(names(count)):
        region = Region(name, (64, 48))
        pieces.append(TensorPiece(f"module.{name}", "bfloat16", region.shape, 4096 * at, region.numel * 2))
        named[f"module.{name}"] = "parameter", Runs.of(whole(region))
    return FileTensors(tuple(pieces), ByName(named))


def optimizer_file(count: int) -> FileTensors:
    """Flat buffers of ZeRO: a master and two moments of each parameter."""
    runs = Runs.of(Run(3072 * at, Region(name, (64, 48)), 0, 3072) for at, name in enumerate(names(count)))
    numel = 3072 * count
    pieces = tuple(
        TensorPiece(name, "float32", (numel,), 4096 + place * numel * 4, numel * 4)
        for place, name in enumerate(("flat.0", *(f"state.0.{key}" for key in STATES)))
    )
    return FileTensors(pieces, ByName({"flat.0": ("master", runs)}, {"state.0": runs}))


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, milliseconds, and the longest pause of another thread in milliseconds."""
    longest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal longest
        before = time.perf_counter()
        while not done.is_set():
            time.sleep(1e-4)
            now = time.perf_counter()
            longest = max(longest, now - before)
            before = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.05)
    longest = 0.0
    began = time.perf_counter()
    result = action()
    taken = time.perf_counter() - began
    done.set()
    watcher.join()
    return result, taken * 1000, longest * 1000


def as_json(files: list[tuple[str, FileTensors]]) -> bytes:
    """What format 1 wrote: a record for each tensor in a file."""
    return json.dumps(
        [
            {"name": s.name, "dtype": s.dtype, "shape": s.shape, "offset": s.offset, "nbytes": s.nbytes, "file": path}
            for path, tensors in files
            for s in tensors.tensors
        ]
    ).encode()


def measure(what: str, files: list[tuple[str, FileTensors]], parameters: dict[str, Any]) -> None:
    indexer = Indexer()
    data, first, pause = timed(lambda: indexer.encode(files, parameters))
    _, again, pause_again = timed(lambda: indexer.encode(files, parameters))
    index, parsing, pause_parsing = timed(lambda: tensor_index.parse(data, what))
    _, walking, _ = timed(lambda: list(index))
    print(f"{what}: {len(index):,} pieces, {len(data):,} bytes, {len(data) / len(index):.0f} each")
    print(f"  first save {first:7.1f} ms (longest pause {pause:.1f})   unchanged {again:6.1f} ms ({pause_again:.1f})")
    print(
        f"  parse      {parsing:7.1f} ms (longest pause {pause_parsing:.1f})   every piece as a record {walking:.0f} ms"
    )


def main() -> None:
    count = int(sys.argv[1]) if sys.argv[1:] else 100_000
    parameters = {name: {"dtype": "bfloat16", "shape": [64, 48]} for name in names(count)}
    model, optimizer = ("t/model.pt", model_file(count)), ("t/optim.pt", optimizer_file(count))
    measure(f"{count:,} parameters", [model], parameters)
    measure(f"{count:,} parameters with master and moments", [model, optimizer], parameters)
    data, taken, pause = timed(lambda: as_json([model]))
    print(f"{count:,} parameters as JSON, format 1: {len(data):,} bytes, {taken:.1f} ms (longest pause {pause:.1f})")


if __name__ == "__main__":
    main()
