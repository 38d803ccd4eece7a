"""Times decode steps of a transformers model: its own attention, and ours over pages.

    python benchmarks/transformers_decode.py --json transformers-h200.json

The model has DeepSeek-V2-Lite's attention (hidden 2048, 16 heads, latent 512, rope 64, nope 128,
values 128) in 27 layers. Each layer has one dense MLP of 10944, about what a token meets of
V2-Lite's experts (8 of 1408), so that no routing is timed. Weights are random, and so are the
latents that the caches are filled with: decode times do not depend on them, and no prompt of this
length has to be computed. Caches of both kinds hold the same latents. The logits of the first step
are compared with those of the same weights and latents in float32 (transformers' own sdpa).

A step is a forward of one token a request, as generate() makes it, clock on the host from the first
step of a series to the end of the last on the device. It includes all of the model and the host.
For the first case the time of generate() a token is taken as well, over 64 greedy tokens of a call
that goes on from the cache: what generate() does itself comes on top of the step.

Paths: transformers' eager and sdpa attention, ours without CUDA graphs, and ours with them. Each
row of the JSON has

- path; batch, the number of requests; context, the tokens of each that the cache begins with;
- ms: milliseconds a step, the best of three series;
- second_step_ms: milliseconds of the second step over the cache, which a graph is captured in;
- workspace_bytes: the most device memory that a step takes beside what it found; null on a CPU;
- logits_error: the norm of the first step's logits less those in float32, over the norm of these;
- cache_bytes: all layers of the cache after the series, pages that are free included;
- generate_ms: milliseconds a token of generate(), null but in the first case;
- ours_is_faster_by: ms over the ms of the last path of the case.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

try:
    import torch
    import transformers
except ImportError as error:
    raise SystemExit(f"This benchmark needs torch and transformers: {error}.") from None

from flashmla_rtc import variants
from flashmla_rtc.cli.machine import driver_version, package_versions
from flashmla_rtc.integrations.transformers import MLAPagedCache, remove_flash_mla, use_flash_mla

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
ROUNDS = 3
GENERATED = 64  # tokens
# Name, transformers' attention or None for ours, and whether steps are CUDA graphs.
PATHS: list[tuple[str, str | None, bool]] = [
    ("eager", "eager", False),
    ("sdpa", "sdpa", False),
    ("flashmla_rtc", None, False),
    ("flashmla_rtc graphs", None, True),
][: 4 if DEVICE.type == "cuda" else 3]
Latents = list[tuple[torch.Tensor, torch.Tensor]]


def make_model(layers: int, context: int) -> Any:
    config = transformers.AutoConfig.for_model(
        "deepseek_v2",
        **SHAPE,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        max_position_embeddings=2 * context,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return model.eval()


def make_latents(batch: int, context: int, layers: int) -> Latents:
    """Of each layer: (batch, 1, context, 512) and (batch, 1, context, 64)."""
    widths = (SHAPE["kv_lora_rank"], SHAPE["qk_rope_head_dim"])
    parts = []
    for _ in range(layers):
        latent, k_pe = (
            torch.randn(batch, 1, context, width, device=DEVICE, dtype=DTYPE) for width in widths
        )
        parts.append((latent, k_pe))
    return parts


def dynamic_cache(model: Any, latents: Latents) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    for layer, (latent, k_pe) in enumerate(latents):
        cache.update(latent, k_pe, layer)
    return cache


def paged_cache(model: Any, latents: Latents) -> MLAPagedCache:
    cache = MLAPagedCache(model.config)
    batch, _, context, _ = latents[0][0].shape
    cache.begin(batch, context, None, DEVICE, max_decode_tokens=1)
    for layer, (latent, k_pe) in enumerate(latents):
        cache.append(layer, latent[:, 0], k_pe[:, 0])
    cache.end()
    return cache


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_steps(model: Any, cache: Any, batch: int, steps: int) -> dict[str, Any]:
    """Milliseconds of the second step, which a graph is captured in, and of others, best of ROUNDS
    series; bytes that a step needs beside the cache.
    """
    tokens = torch.ones(batch, 1, dtype=torch.long, device=DEVICE)
    first = model(tokens, past_key_values=cache).logits.float()  # loads kernels, too
    synchronise()
    begin = time.perf_counter()
    model(tokens, past_key_values=cache)
    synchronise()
    second = 1e3 * (time.perf_counter() - begin)
    workspace = None
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(tokens, past_key_values=cache)
        synchronise()
        workspace = torch.cuda.max_memory_allocated() - before
    seconds = []
    for _ in range(ROUNDS):
        synchronise()
        begin = time.perf_counter()
        for _ in range(steps):
            model(tokens, past_key_values=cache)
        synchronise()
        seconds.append((time.perf_counter() - begin) / steps)
    return {
        "first": first,
        "ms": 1e3 * min(seconds),
        "second_step_ms": round(second, 2),
        "workspace_bytes": workspace,
    }


def time_generate(model: Any, cache: Any, batch: int) -> float:
    """Milliseconds a token of generate(), which goes on from a cache."""
    seconds = 0.0
    for tokens in (8, GENERATED):  # the first call is a warm-up
        shape = (batch, cache.get_seq_length() + 1)
        ids = torch.ones(shape, dtype=torch.long, device=DEVICE)
        synchronise()
        begin = time.perf_counter()
        sequences = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
        )
        synchronise()
        seconds = time.perf_counter() - begin
        assert sequences.shape[1] == shape[1] + tokens
    return round(1e3 * seconds / GENERATED, 3)


def logits_of(reference: Any, latents: Latents) -> torch.Tensor:
    """Of the first step, by a model in float32."""
    cache = dynamic_cache(reference, [(latent.float(), k_pe.float()) for latent, k_pe in latents])
    tokens = torch.ones(len(latents[0][0]), 1, dtype=torch.long, device=DEVICE)
    logits: torch.Tensor = reference(tokens, past_key_values=cache).logits
    return logits


@torch.no_grad()
def measure(
    model: Any, reference: Any, batch: int, context: int, steps: int, generates: bool
) -> list[dict[str, Any]]:
    """A row for each path, the fastest of ours last."""
    latents = make_latents(batch, context, model.config.num_hidden_layers)
    exact = logits_of(reference, latents)
    rows: list[dict[str, Any]] = []
    for path, attention, graphs in PATHS:
        if attention is None:
            use_flash_mla(model, cuda_graphs=graphs)
            cache: Any = paged_cache(model, latents)
        else:
            model.set_attn_implementation(attention)
            cache = dynamic_cache(model, latents)
        row = {"path": path, "batch": batch, "context": context}
        row |= time_steps(model, cache, batch, steps)
        row["logits_error"] = float((row.pop("first") - exact).norm() / exact.norm())
        if attention is None:
            row["cache_bytes"] = cache.memory().allocated  # free pages included
        else:
            tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
            row["cache_bytes"] = sum(t.nbytes for t in tensors)
        row["generate_ms"] = time_generate(model, cache, batch) if generates else None
        if attention is None:
            remove_flash_mla(model)
        rows.append(row)
        del cache
    for row in rows:
        row["ours_is_faster_by"] = round(row["ms"] / rows[-1]["ms"], 2)
        row["ms"] = round(row["ms"], 3)
        generate = f"  generate {row['generate_ms']:.2f} ms" if generates else ""
        print(
            f"{batch:>5} {context:>8} {row['path']:>20} {row['ms']:>9.2f} ms "
            f"{row['ours_is_faster_by']:>7.2f}×  cache {row['cache_bytes'] / 2**20:>8.1f} MiB  "
            f"workspace {(row['workspace_bytes'] or 0) / 2**20:>8.1f} MiB  "
            f"logits {row['logits_error']:.1e}  second {row['second_step_ms']:.1f} ms{generate}",
            flush=True,
        )
    return rows


def command_of(arguments: list[str]) -> str:
    """What was run; files by their names alone, wherever they lie."""

    def shown(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return option + equals + Path(value).name if "/" in value else argument

    return shlex.join(["python", "benchmarks/transformers_decode.py", *map(shown, arguments)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--steps", type=int, default=20, help="of each of three series")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    model = make_model(options.layers, max(options.context))
    reference = copy.deepcopy(model).float()
    reference.set_attn_implementation("sdpa")
    rows: list[dict[str, Any]] = []
    for context in options.context:
        for batch in options.batch:
            rows += measure(model, reference, batch, context, options.steps, generates=not rows)
    if options.json:
        document = {
            "device": name,
            "digest": variants.sources_digest(),
            "kernels_digest": variants.kernels_digest(),
            "driver": driver_version(),
            "versions": {**package_versions(), "transformers": transformers.__version__},
            "command": command_of(sys.argv[1:]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            "model": {**SHAPE, "layers": options.layers, "dtype": str(DTYPE), "mlp": "dense"},
            "rows": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
