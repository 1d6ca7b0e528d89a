"""What more experts cost in memory and time to load, with one backbone for all, and with a copy for each.

    python -m benchmarks.experts --csv benchmarks/experts.csv

On the CPU, from the root of the repository. A backbone of 0.6 B parameters (the sizes of Qwen3-0.6B, random weights) is
written in bfloat16 to a temporary folder once: 1.2 GB. Every row is a fresh child that has made its imports, loads it,
builds the decoder (d_model 384, 6 layers, 6 heads), and reads all weights once. "shared": one backbone for all experts.
"copies": each expert loads its own. "mapped": weights as they are stored, which stay in the file: their pages are
RssFile, clean, shared by all who map the file, and can be dropped by the kernel. "read": converted to float16, in
memory of the process's own (RssAnon), as on a GPU. Bytes are above those after the imports, except `weight_bytes`;
`proportional` (Pss) counts a page of the file that is mapped twice once. The file is in the page cache.
"""

import argparse
import csv
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
"""Of the memory of several experts to that of one."""
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
    "load_seconds", "build_seconds", "read_seconds", "ratio",
)  # fmt: skip
DEADLINE_SECONDS = 600.0


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
    import torch
    import transformers

    from memfit.models.experts_language import ExpertsLanguageModel
    from memfit.models.language_settings import LanguageSettings
    from memfit.workloads.backbone import load_backbone

    _ = transformers.Qwen3ForCausalLM, torch.ones(256, 256) @ torch.ones(256, 256)  # imported, and threads started
    experts = payload["num_experts"]
    copies = experts if payload["row"] == "copies" else 1
    before, began = _memory(), time.perf_counter()
    backbones = [load_backbone(payload["folder"], DTYPES[payload["weights"]]) for _ in range(copies)]
    loaded = time.perf_counter()
    settings = LanguageSettings(name="experts", vocab_size=SIZES["vocab_size"], **DECODER, num_experts=experts)
    model = ExpertsLanguageModel(settings, backbones[0])
    built = time.perf_counter()
    tensors = {*model.parameters(), *(tensor for backbone in backbones for tensor in backbone.parameters())}
    for tensor in tensors:
        tensor.detach().view(torch.uint8).flatten()[::2048].sum()  # one byte of every page
    ended, after = time.perf_counter(), _memory()
    backbone_bytes = sum(tensor.nbytes for backbone in backbones for tensor in backbone.parameters())
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    return {
        "backbone_bytes": backbone_bytes,
        "decoder_bytes": weight_bytes - backbone_bytes,
        "weight_bytes": weight_bytes,
        **{f"{name}_bytes": after[name] - before[name] for name in after if name != "peak"},
        "peak_bytes": after["peak"] - before["resident"],
        "load_seconds": loaded - began,
        "build_seconds": built - loaded,
        "read_seconds": ended - built,
    }


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


def measure(rounds: int, csv_path: Path | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "backbone", Path(temporary) / "child.log"
        made = in_child("save", {"folder": str(folder)}, log)
        print(f"backbone: {made['num_parameters']:,} parameters")
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


def print_row(row: dict[str, Any]) -> None:
    sizes = ", ".join(
        f"{name} {row[f'{name}_bytes'] / GB:.3f}"
        for name in ("weight", "resident", "anonymous", "file", "proportional", "peak")
    )
    seconds = row["load_seconds"] + row["build_seconds"] + row["read_seconds"]
    print(
        f"{row['row']} {row['weights']:6s} {row['num_experts']} experts: {sizes} GB, {seconds:.1f} s; resident x "
        f"{row['ratio']:.3f}",
        flush=True,
    )


def print_marks(rows: list[dict[str, Any]]) -> None:
    print()
    one = next(row for row in rows if row["row"] == "shared")
    ok = "kept" if one["backbone_bytes"] <= MOST_BACKBONE_BYTES else "MISSED"
    print(f"backbone: {one['backbone_bytes'] / GB:.3f} GB (mark: {MOST_BACKBONE_BYTES / GB:.2f}, {ok})")
    for case in cases():
        chosen = [row for row in rows if all(row[key] == value for key, value in case.items())]
        ratio = statistics.median(row["ratio"] for row in chosen)
        load = statistics.median(row["load_seconds"] for row in chosen)
        total = statistics.median(row["load_seconds"] + row["build_seconds"] + row["read_seconds"] for row in chosen)
        mark = f" (mark: {MOST_RATIO:.2f}, {'kept' if ratio <= MOST_RATIO else 'MISSED'})"
        print(
            f"{case['row']}, {case['weights']}, {case['num_experts']} experts: {ratio:.3f} of one's memory"
            f"{mark if case['row'] == 'shared' else ''}; beside it {chosen[0]['decoder_bytes'] / 1e6:.1f} MB; "
            f"{load:.2f} s to load, {total:.2f} s until all is read"
        )


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=None, help="write a row a child here")
    options = parser.parse_args()
    print_marks(measure(options.rounds, options.csv))


if __name__ == "__main__":
    sys.exit(main())
