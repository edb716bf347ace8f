"""LoRA training of an adapter under Ray Train and DeepSpeed beside a bare peft and torch loop, alternating in one run.

Both train the same untrained language model with the same LoRA options on the same examples of titles and vectors, in
batches of the same size. The loop is what one would write at once: examples in random order, padded to the longest, one
vector written over a placeholder's embedding, the model's own loss. Its batches and ours hold other examples, so what is
compared are tokens/s, padding not counted.

Figures: `vs_bare_peft` (median of the rounds' ratios of tokens/s), tokens/s of each; with a GPU `flops_utilisation`, model FLOPs
(six a parameter and token forward and back, of which a frozen weight's gradient is left out) over the peak given. A model of
7B's shape with random weights, on a GPU of 989 dense bfloat16 TFLOP/s:

    make bench NAME=align ARGS='--shape 4096,32,32,11008 --dtype bfloat16 --steps 40 --peak_tflops 989'
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
import torch
from transformers import LlamaForCausalLM

from raypipe.language.adapters import AdapterCard, AdapterConfig, LoraOptions
from raypipe.language.alignment import AlignmentTask, prepare_alignment
from raypipe.language.backbone import load_backbone
from raypipe.language.builtin import BuiltinLmConfig, save_untrained, train_tokenizer
from raypipe.language.projectors import ProjectorConfig
from raypipe.language.prompt import Prompt, Vectors
from raypipe.language.soft_prompts import IGNORED, SoftExample
from raypipe.runtime.trainer import TrainerConfig, fit

WIDTH, EXAMPLES, BATCH = 64, 4_000, 16
LORA = LoraOptions(dropout=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="of each of the two in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--lm", help="checkpoint folder; unset: an untrained model")
    parser.add_argument("--shape", help="of the untrained one: width,layers,heads,mlp; unset: of the built-in's size")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both")
    parser.add_argument("--peak_tflops", type=float, help="of the GPU, for its utilisation")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ray.init(num_cpus=given.threads, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch:
        examples = make_examples(EXAMPLES)
        lm = given.lm or untrained(Path(scratch) / "lm", examples, given.shape)
        options = given.steps, given.dtype, device
        ours, bare = [], []
        for number in range(given.rounds):
            ours.append(by_trainer(Path(scratch) / str(number), lm, examples, given.threads, *options))
            bare.append(by_loop(lm, examples, *options))
            print(f"round {number + 1}: {ours[-1]:,.0f} tokens/s, bare {bare[-1]:,.0f}", file=sys.stderr)
        weights = sum(weight.numel() for weight in load_backbone(lm, given.dtype, "cpu").model.parameters())
    figures = {
        "vs_bare_peft": round(statistics.median(a / b for a, b in zip(ours, bare, strict=True)), 3),
        "tokens_per_s": round(statistics.median(ours)),
        "bare_tokens_per_s": round(statistics.median(bare)),
    }
    if given.peak_tflops:
        figures["flops_utilisation"] = round(4 * weights * statistics.median(ours) / (given.peak_tflops * 1e12), 3)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {given.threads} threads, {device}, {given.dtype}"
    print(json.dumps({"bench": "align", "figures": figures, "machine": machine}))


def make_examples(count: int) -> list[SoftExample]:
    """Histories of two to ten made-up titles behind a vector, and one title to answer."""
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("sto", "ri", "mo", "la", "ke", "dun") for b in ("ne", "ver", "lin", "ta", "gos")]
    titles = [" ".join(rng.choice(words, rng.integers(1, 5))).title() for _ in range(1_500)]
    found = []
    for _ in range(count):
        history = "; ".join(titles[n] for n in rng.integers(0, len(titles), rng.integers(2, 11)))
        vector = Vectors(rng.normal(size=(1, WIDTH)).astype(np.float32), "user")
        prompt = Prompt.of("Somebody chose ", vector, f": {history}. What will be chosen next?")
        found.append(SoftExample(prompt, titles[int(rng.integers(len(titles)))]))
    return found


def untrained(folder: Path, examples: Sequence[SoftExample], shape: str | None) -> str:
    tokenizer = train_tokenizer([example.prompt.words for example in examples], [], [], 4_000)
    small = BuiltinLmConfig(size="small", context=512)
    if shape is None:
        save_untrained(folder, small, tokenizer)
        return str(folder)
    width, layers, heads, mlp = map(int, shape.split(","))
    config = small.llama(len(tokenizer))
    config.update(
        {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp, "head_dim": width // heads}
    )
    config.update({"num_attention_heads": heads, "num_key_value_heads": heads, "initializer_range": width**-0.5})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def by_trainer(
    folder: Path, lm: str, examples: Sequence[SoftExample], threads: int, steps: int, dtype: str, device: str
) -> float:
    """Tokens/s from the first step to the last."""
    backbone = load_backbone(lm, "bfloat16", "cpu")  # for its tokenizer; training reads the checkpoint itself
    config = AdapterConfig(projectors={"user": ProjectorConfig()}, lora=LORA)
    card = AdapterCard(config, {"user": WIDTH}, "", "")
    prepare_alignment(folder / "data", examples, backbone, backbone.ends[0], backbone.context, lm, card, 0)
    task = AlignmentTask(folder / "data")
    tokens = sum(int(task.batch(step, 0, 0, 1, BATCH)["mask"].sum()) for step in range(steps))
    options = {"steps": steps, "batch_size": BATCH, "lr": 1e-4, "warmup_steps": 0, "checkpoint_every": 10**6}
    trainer = TrainerConfig.model_validate({**options, "cpus_per_worker": threads, "device": device, "dtype": dtype})
    return tokens / fit(task, trainer, f"bench-{folder.name}", folder / "out").seconds


def by_loop(lm: str, examples: Sequence[SoftExample], steps: int, dtype: str, device: str) -> float:
    """Tokens/s of the bare loop, after two steps of warming up."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lm)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(lm, dtype=kind)
    model = get_peft_model(
        model, LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=list(LORA.targets), lora_dropout=0.0)
    )
    projector = torch.nn.Linear(WIDTH, model.config.hidden_size, dtype=kind)
    model, projector = model.to(device), projector.to(device)
    trained = [*projector.parameters(), *(weight for weight in model.parameters() if weight.requires_grad)]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    order = np.random.default_rng(0).permutation(len(examples))
    model.train()

    def step(number: int) -> int:
        chosen = [examples[place] for place in order[number * BATCH % (len(order) - BATCH) :][:BATCH]]
        rows, places, starts = [], [], []
        for example in chosen:
            before, _, after = example.prompt.segments
            head = tokenizer(before.text)["input_ids"]
            prompt = [*head, 0, *tokenizer(after.text, add_special_tokens=False)["input_ids"]]
            answer = tokenizer(f" {example.answer}", add_special_tokens=False)["input_ids"]
            places.append(len(head))
            starts.append(len(prompt))
            rows.append([*prompt, *answer, tokenizer.eos_token_id])
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        labels = ids.clone()
        for at, (row, start) in enumerate(zip(rows, starts, strict=True)):
            labels[at, :start] = IGNORED
            labels[at, len(row) :] = IGNORED
        embedded = model.get_input_embeddings()(ids).clone()
        vectors = np.concatenate([example.prompt.segments[1].values for example in chosen])
        embedded[torch.arange(len(rows)), places] = projector(torch.from_numpy(vectors).to(device, kind))
        loss = model(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return sum(map(len, rows))

    for number in range(2):
        step(number)
    started = time.monotonic()
    tokens = sum(step(number) for number in range(2, 2 + steps))
    return tokens / (time.monotonic() - started)


if __name__ == "__main__":
    main()
