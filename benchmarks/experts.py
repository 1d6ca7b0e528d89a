"""What more experts cost in memory and time to load, with one backbone for all, and with a copy for each.

    python -m benchmarks.experts --csv benchmarks/experts.csv

On the CPU, from the root of the repository. A backbone of 0.6 B parameters (the sizes of Qwen3-0.6B, random weights) is
written in bfloat16 to a temporary folder once: 1.2 GB. Every row is a fresh child that has made its imports, loads it,
builds the decoder (d_model 384, 6 layers, 6 heads), and reads all weights once. "shared": one backbone for all experts.
"copies": each expert loads its own. "mapped": weights as they are stored, which stay in the file: their pages are
RssFile, clean, shared by all who map the file, and can be dropped by the kernel. "read": converted to float16, in
memory of the process's own (RssAnon), as on a GPU. Bytes are above those after the imports, except `weight_bytes`;
`proportional` (Pss) counts a page of the file that is mapped twice once. The file is in the page cache.

Seconds of fresh children differ by half from one to the next. So time is compared within one child ("timed"): all
numbers of experts load, build and read in turns, the order turned by one each round; a ratio is the median over rounds
of a number's seconds to those of one expert in the same round. One expert comes twice: "again" shows what is noise.
"""

import argparse
import csv
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.planner_cases import stamp
from memfit.memory.enforcement import process_status
from memfit.process import Emit, run_child

GB = 1e9
MOST_BACKBONE_BYTES = 1.20 * GB
MOST_RATIO = 1.05
"""Of the memory, and of the load time, of several experts to that of one."""
DECODER = {"d_model": 384, "num_layers": 6, "num_heads": 6}
SIZES = {
    "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip
DTYPES = {"mapped": "bfloat16", "read": "float16"}
STORED = "bfloat16"
SHARED, COPIES = (1, 2, 4, 8), (1, 2)
COLUMNS = (
    "date", "commit", "device", "torch", "row", "weights", "num_experts", "round", "backbone_bytes", "decoder_bytes",
    "weight_bytes", "resident_bytes", "anonymous_bytes", "file_bytes", "proportional_bytes", "peak_bytes",
    "load_seconds", "build_seconds", "read_seconds", "ratio", "time_ratio",
)  # fmt: skip
SECONDS = ("load_seconds", "build_seconds", "read_seconds")
DEADLINE_SECONDS = 1800.0


def save(payload: dict[str, Any], _emit: Emit) -> dict[str, Any]:
    """Be the child that writes the folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.Qwen3Config(**SIZES)
    causal = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, STORED))
    causal.save_pretrained(payload["folder"])
    return {"num_parameters": sum(parameter.numel() for parameter in causal.parameters())}


def load(payload: dict[str, Any], _emit: Emit) -> dict[str, Any]:
    """Be the child that loads: say what it took."""
    _import()
    experts = payload["num_experts"]
    copies = experts if payload["row"] == "copies" else 1
    before = _memory()
    seconds, model, backbones = _loaded(payload["folder"], payload["weights"], experts, copies)
    after = _memory()
    tensors = _tensors(model, backbones)
    backbone_bytes = sum(tensor.nbytes for backbone in backbones for tensor in backbone.parameters())
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    return {
        "backbone_bytes": backbone_bytes,
        "decoder_bytes": weight_bytes - backbone_bytes,
        "weight_bytes": weight_bytes,
        **{f"{name}_bytes": after[name] - before[name] for name in after if name != "peak"},
        "peak_bytes": after["peak"] - before["resident"],
        **seconds,
    }


def time_loads(payload: dict[str, Any], emit: Emit) -> None:
    """Be the child that loads again and again: tell how long each took."""
    _import()
    order = [*SHARED, 1]
    for number in range(payload["rounds"] + 1):
        shift = number % len(order)
        for place in (*range(shift, len(order)), *range(shift)):
            seconds, *loaded = _loaded(payload["folder"], payload["weights"], order[place], 1)
            del loaded
            gc.collect()
            if number:  # the first round touches the file and the memory
                again = place == len(order) - 1
                emit({"event": "timed", "num_experts": order[place], "again": again, "round": number - 1, **seconds})


def _import() -> None:
    """Import what loading needs, and start torch's threads."""
    import torch
    import transformers

    import memfit.models.experts_language
    import memfit.workloads.backbone

    _ = transformers.Qwen3ForCausalLM, memfit.models.experts_language, memfit.workloads.backbone
    torch.ones(256, 256) @ torch.ones(256, 256)


def _loaded(folder: str, weights: str, experts: int, copies: int) -> tuple[dict[str, float], Any, list[Any]]:
    """Load backbones, build the model on the first, read all weights; return the seconds of each, and both."""
    import torch

    from memfit.models.experts_language import ExpertsLanguageModel
    from memfit.models.language_settings import LanguageSettings
    from memfit.workloads.backbone import load_backbone

    began = time.perf_counter()
    backbones = [load_backbone(folder, DTYPES[weights]) for _ in range(copies)]
    loaded = time.perf_counter()
    settings = LanguageSettings(name="experts", vocab_size=SIZES["vocab_size"], **DECODER, num_experts=experts)
    model = ExpertsLanguageModel(settings, backbones[0])
    built = time.perf_counter()
    for tensor in _tensors(model, backbones):
        tensor.detach().view(torch.uint8).flatten()[::2048].sum()  # one byte of every page
    seconds = (loaded - began, built - loaded, time.perf_counter() - built)
    return dict(zip(SECONDS, seconds, strict=True)), model, backbones


def _tensors(model: Any, backbones: list[Any]) -> set[Any]:
    return {*model.parameters(), *(tensor for backbone in backbones for tensor in backbone.parameters())}


def _memory() -> dict[str, int]:
    status = process_status()
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    proportional = next(line for line in rollup if line.startswith("Pss:"))
    return {
        "resident": status["VmRSS"],
        "anonymous": status["RssAnon"],
        "file": status["RssFile"],
        "proportional": int(proportional.split()[1]) * 1024,
        "peak": status["VmHWM"],
    }


def cases() -> list[dict[str, Any]]:
    return [
        {"row": row, "weights": weights, "num_experts": experts}
        for weights in DTYPES
        for row, counts in (("shared", SHARED), ("copies", COPIES))
        for experts in counts
    ]


def in_child(name: str, payload: dict[str, Any], log: Path) -> dict[str, Any]:
    outcome = run_child(f"benchmarks.experts:{name}", payload, log=log, deadline_seconds=DEADLINE_SECONDS)
    return dict(outcome.unwrap(name))


def measure(rounds: int, timed_rounds: int, csv_path: Path | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "backbone", Path(temporary) / "child.log"
        made = in_child("save", {"folder": str(folder)}, log)
        print(f"backbone: {made['num_parameters']:,} parameters")
        for weights in DTYPES:
            rows += timed(weights, timed_rounds, folder, log)
        for number in range(rounds):
            ones: dict[tuple[str, str], int] = {}
            for case in cases():
                found = in_child("load", {**case, "folder": str(folder)}, log)
                one = ones.setdefault((case["row"], case["weights"]), found["resident_bytes"])
                rows.append({**case, "round": number, **found, "ratio": found["resident_bytes"] / one})
                print_row(rows[-1])
            if csv_path:
                write(csv_path, rows)
    return rows


def timed(weights: str, rounds: int, folder: Path, log: Path) -> list[dict[str, Any]]:
    """Load in turns in one child; a row a load, with its seconds as a ratio to those of one expert in its round."""
    found: list[dict[str, Any]] = []
    payload = {"folder": str(folder), "weights": weights, "rounds": rounds}
    run_child(
        "benchmarks.experts:time_loads", payload, log=log, deadline_seconds=DEADLINE_SECONDS, on_event=found.append
    ).unwrap("timing")
    loads = [{key: value for key, value in event.items() if key != "event"} for event in found if "again" in event]
    ones = {load["round"]: total_seconds(load) for load in loads if load["num_experts"] == 1 and not load["again"]}
    return [
        {"row": "timed again" if load.pop("again") else "timed", "weights": weights, **load}
        | {"time_ratio": total_seconds(load) / ones[load["round"]]}
        for load in loads
    ]


def total_seconds(row: dict[str, Any]) -> float:
    return float(sum(row[name] for name in SECONDS))


def print_row(row: dict[str, Any]) -> None:
    sizes = ", ".join(
        f"{name} {row[f'{name}_bytes'] / GB:.3f}"
        for name in ("weight", "resident", "anonymous", "file", "proportional", "peak")
    )
    print(
        f"{row['row']} {row['weights']:6s} {row['num_experts']} experts: {sizes} GB, {total_seconds(row):.1f} s; "
        f"resident x {row['ratio']:.3f}",
        flush=True,
    )


def print_marks(rows: list[dict[str, Any]]) -> None:
    print()
    one = next(row for row in rows if row["row"] == "shared")
    ok = "kept" if one["backbone_bytes"] <= MOST_BACKBONE_BYTES else "MISSED"
    print(f"backbone: {one['backbone_bytes'] / GB:.3f} GB (mark: {MOST_BACKBONE_BYTES / GB:.2f}, {ok})")
    for case in cases():
        chosen = [row for row in rows if all(row[key] == value for key, value in case.items())]
        memory = statistics.median(row["ratio"] for row in chosen)
        load = statistics.median(row["load_seconds"] for row in chosen)
        total = statistics.median(map(total_seconds, chosen))
        shared = case["row"] == "shared"
        print(
            f"{case['row']}, {case['weights']}, {case['num_experts']} experts: {memory:.3f} of one's memory"
            f"{marked(memory) if shared else ''}; beside it {chosen[0]['decoder_bytes'] / 1e6:.1f} MB; "
            f"{load:.2f} s to load, {total:.2f} s until all is read in a fresh child"
            + (f"; in turns {turns(rows, case)}" if shared else "")
        )


def marked(ratio: float) -> str:
    return f" (mark: {MOST_RATIO:.2f}, {'kept' if ratio <= MOST_RATIO else 'MISSED'})"


def turns(rows: list[dict[str, Any]], case: dict[str, Any]) -> str:
    """Say how long a number of experts took in turns with the others, beside its mark; of one, what is noise."""
    same = [row for row in rows if all(row[key] == case[key] for key in ("weights", "num_experts"))]
    loads = [row for row in same if row["row"] == "timed"]
    told = f"{statistics.median(map(total_seconds, loads)):.2f} s"
    if case["num_experts"] == 1:
        again = statistics.median(row["time_ratio"] for row in same if row["row"] == "timed again")
        return f"{told}, once more {again:.3f} of that"
    low, middle, high = statistics.quantiles((row["time_ratio"] for row in loads), n=4)
    return f"{told}, {middle:.3f} of one's{marked(middle)}, half of the rounds {low:.3f} to {high:.3f}"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    stamped = stamp()

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        return {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()}

    with path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(stamped | shown(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of fresh children")
    parser.add_argument("--timed-rounds", type=int, default=15, help="of loads in turns within one child")
    parser.add_argument("--csv", type=Path, default=None, help="write a row a child here")
    options = parser.parse_args()
    print_marks(measure(options.rounds, options.timed_rounds, options.csv))


if __name__ == "__main__":
    sys.exit(main())
