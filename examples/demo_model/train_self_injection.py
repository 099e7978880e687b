"""Turn a base checkpoint into a SharedLLM and train it on 8192-token text: 6 chunks of context, 2048 running tokens.

    python train_self_injection.py --data work/data --base work/base --out work/paper_set \\
        --trainable injected+upper-attention --seconds 125

``--trainable injected+upper-attention`` is the paper's set: the injected blocks and the self-attention of the layers
above them. ``--trainable everything`` also trains the base weights, and with them the compressor, which shares them.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    Windows,
    evenly_spaced_windows,
    learning_rate_factor,
    load_documents,
    machine,
    pick_device,
    save_tokenizer,
    synchronize,
)
from files import log, write_json
from torch import Tensor, nn

from sharedllm_ext import SharedLLMForCausalLM

INJECTED = re.compile(r"(^|[._])inject")
COMPRESSOR = re.compile(r"(^|[._])compressor")
SELF_ATTENTION = re.compile(r"(^|\.)layers\.(\d+)\.self_attn\.")


def select_trainable(model: nn.Module, which: str, injection_layers: int) -> tuple[list[str], list[str]]:
    """Freeze what ``which`` leaves out; returns the names of the trained injected and other parameters."""
    injected, others = [], []
    for name, parameter in model.named_parameters():
        if INJECTED.search(name):
            injected.append(name)
            continue
        match = SELF_ATTENTION.search(name)
        upper = match is not None and int(match[2]) >= injection_layers and not COMPRESSOR.search(name)
        parameter.requires_grad_(upper or which == "everything")
        if parameter.requires_grad:
            others.append(name)
    if not injected or not others:
        raise RuntimeError(f"expected injected and other trainable parameters, got {len(injected)} and {len(others)}")
    return injected, others


def parameter_groups(
    model: nn.Module, injected: list[str], others: list[str], injected_lr: float, lr: float, weight_decay: float
) -> list[dict[str, object]]:
    """Injected and other parameters at their own peak rates; matrices decay, norms and the embedding do not."""
    parameters = dict(model.named_parameters())
    groups: list[dict[str, object]] = []
    for names, peak in ((injected, injected_lr), (others, lr)):
        decayed = [parameters[n] for n in names if parameters[n].dim() == 2 and "embed" not in n]
        plain = [parameters[n] for n in names if parameters[n].dim() != 2 or "embed" in n]
        groups.append({"params": decayed, "lr": peak, "peak": peak, "weight_decay": weight_decay})
        if plain:
            groups.append({"params": plain, "lr": peak, "peak": peak, "weight_decay": 0.0})
    return groups


def draw_chunks(generator: np.random.Generator, chunks: int, full_share: float) -> int:
    """Chunks of context in one step: all with probability ``full_share``, else any smaller number, 0 included."""
    return chunks if generator.random() < full_share else int(generator.integers(0, chunks))


def batch_loss(model: nn.Module, tokens: Tensor, window: int, context: int) -> Tensor:
    """Next-token loss on the last ``window`` tokens, given the ``context`` tokens right before them."""
    running = tokens[:, -window:]
    inputs: dict[str, Tensor] = {"input_ids": running, "labels": running}
    if context:
        inputs["context_ids"] = tokens[:, -window - context : -window]
    loss = model(**inputs, use_cache=False).loss
    assert isinstance(loss, Tensor)
    return loss


def compile_parts(model: Any, injection_layers: int) -> list[nn.Module]:
    """Compile what is an ordinary Transformers module: the upper layers whole, of the lower ones norms and MLP."""
    layers = model.model.layers
    parts = list(layers[injection_layers:])
    for layer in layers[:injection_layers]:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            # the compressor calls them with packed context tokens, the decoder with a batch of running text
            part.compile(dynamic=True)
            parts.append(part)
    for layer in layers[injection_layers:]:
        layer.compile()
    return parts


def forget_compiled(parts: list[nn.Module]) -> None:
    for part in parts:
        part._compiled_call_impl = None


def warm_up(model: nn.Module, tokens: Tensor, window: int, lengths: list[int], parts: list[nn.Module]) -> bool:
    """Run forward and backward before the clock starts; returns whether compiled code is in use."""
    compiled = bool(parts)
    for attempt in range(2):
        try:
            for length in lengths:
                with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
                    loss = batch_loss(model, tokens, window, length)
                loss.backward()
            break
        except Exception as error:
            if attempt or not parts:
                raise
            log(f"torch.compile failed, continuing without it: {str(error).splitlines()[0]}")
            forget_compiled(parts)
            compiled = False
    model.zero_grad(set_to_none=True)
    synchronize(tokens.device)
    return compiled


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, window: int, context: int, batch: int) -> float:
    losses = []
    for part in rows.split(batch):
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            losses.append(float(batch_loss(model, part, window, context)) * len(part))
    return math.exp(sum(losses) / len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare_data.py")
    parser.add_argument("--base", type=Path, required=True, help="folder written by train_base.py")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--trainable", choices=("injected+upper-attention", "everything"), required=True)
    parser.add_argument("--seconds", type=float, default=125.0)
    parser.add_argument("--max-steps", type=int, help="stop earlier (for a quick trial)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=6, help="chunks of context in the longest sequences")
    parser.add_argument(
        "--full-share", type=float, default=0.6, help="share of steps with all chunks, others with fewer"
    )
    parser.add_argument("--injection-layers", type=int, default=4)
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--tree-depth", type=int, default=3)
    parser.add_argument("--slots-per-node", type=int, default=32)
    parser.add_argument(
        "--split-noise", type=float, help="standard deviation of the split point (default: the model's)"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak rate of weights that the base model has")
    parser.add_argument("--injected-lr", type=float, default=3e-3, help="peak rate of the injected blocks")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.add_argument("--device")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    generator = np.random.default_rng(args.seed)

    fields = {} if args.split_noise is None else {"split_noise": args.split_noise}
    model: Any = SharedLLMForCausalLM.from_base(
        args.base,
        injection_layers=args.injection_layers,
        chunk_size=args.chunk_size,
        tree_depth=args.tree_depth,
        slots_per_node=args.slots_per_node,
        window=args.window,
        query_aware=False,
        **fields,
    )
    model.float().to(device)
    # one pass over the whole batch's context: this model's activations are small
    model.config.micro_batch_tokens = args.batch * args.chunks * args.chunk_size
    context = args.chunks * args.chunk_size
    length = context + args.window
    train = load_documents(args.data, "train")
    windows = Windows(train, length, device, args.seed + 1)
    held_out = torch.from_numpy(evenly_spaced_windows(load_documents(args.data, "heldout"), length, 96)).to(device)
    injected, others = select_trainable(model, args.trainable, args.injection_layers)
    groups = parameter_groups(model, injected, others, args.injected_lr, args.lr, args.weight_decay)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    parameters = sum(p.numel() for p in model.parameters())
    trained_count = sum(p.numel() for p in trained)
    log(f"{args.trainable}: {trained_count / 1e6:.2f}M of {parameters / 1e6:.2f}M parameters trained, {device}")

    model.eval()
    small = max(1, args.batch // 2)
    before = perplexity(model, held_out, args.window, 0, small)
    log(f"base model, window only, {len(held_out)} held-out windows: perplexity {before:.4f}")

    model.train()
    begin = time.monotonic()
    wanted = device.type == "cuda" if args.compile is None else args.compile
    parts = compile_parts(model, args.injection_layers) if wanted else []
    sizes = [chunks * args.chunk_size for chunks in sorted({args.chunks, 1, 0}, reverse=True)]
    compiled = warm_up(model, windows.sample(args.batch), args.window, sizes, parts)
    warm_up_seconds = time.monotonic() - begin
    log(f"warm-up took {warm_up_seconds:.1f} s, compiled: {compiled}")
    history: list[dict[str, float]] = []
    running = torch.zeros((), device=device)
    steps = steps_logged = tokens_logged = tokens = 0
    begin = last = time.monotonic()
    while True:
        elapsed = time.monotonic() - begin
        if elapsed >= args.seconds or (args.max_steps is not None and steps >= args.max_steps):
            break
        factor = learning_rate_factor(elapsed / args.seconds)
        if args.max_steps is not None:
            factor = min(factor, learning_rate_factor(steps / args.max_steps))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        length_now = draw_chunks(generator, args.chunks, args.full_share) * args.chunk_size
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = batch_loss(model, windows.sample(args.batch), args.window, length_now)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        steps += 1
        tokens += args.batch * (length_now + args.window)
        # the host must not run ahead of the clock that drives the schedule
        if steps % 4 == 0:
            synchronize(device)
        if steps % args.log_every == 0:
            now = time.monotonic()
            mean = float(running) / (steps - steps_logged)
            speed = (tokens - tokens_logged) / (now - last)
            if not math.isfinite(mean):
                raise SystemExit(f"the loss is {mean} at step {steps}: use a lower --lr")
            log(f"step {steps} loss {mean:.4f} rate x{factor:.3f} {speed / 1e6:.3f}M tokens/s")
            history.append({"step": steps, "seconds": now - begin, "loss": mean, "tokens_per_second": speed})
            running.zero_()
            steps_logged, tokens_logged, last = steps, tokens, now
    synchronize(device)
    seconds = time.monotonic() - begin

    forget_compiled(parts)
    model.eval()
    after = {
        "base_window_only": before,
        "window_only": perplexity(model, held_out, args.window, 0, small),
        "with_context": perplexity(model, held_out, args.window, context, small),
    }
    log(
        f"{steps} steps in {seconds:.1f} s; held-out perplexity {after['window_only']:.4f} window only, "
        f"{after['with_context']:.4f} with {context} tokens of context"
    )

    model.config.micro_batch_tokens = None
    model.to(torch.bfloat16).save_pretrained(args.out)
    save_tokenizer(args.data / "tokenizer", args.out)
    write_json(
        args.out / "training.json",
        {
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "machine": machine(device),
            "parameters": parameters,
            "trained_parameters": trained_count,
            "seconds": seconds,
            "warm_up_seconds": warm_up_seconds,
            "compiled": compiled,
            "steps": steps,
            "tokens": tokens,
            "running_tokens": steps * args.batch * args.window,
            "held_out_perplexity": after,
            "history": history,
        },
    )
    log(f"saved {args.out}")


if __name__ == "__main__":
    main()
