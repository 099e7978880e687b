"""Train the base model: a plain Transformers Llama of about 7.5M parameters on Python source.

    python train_base.py --data work/data --out work/base --seconds 170

The learning-rate schedule follows the clock, so the time budget decides how much text is read.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.03,
    )
    return LlamaForCausalLM(config)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and the embedding do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() == 2 and "embed" not in name else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


class Step(nn.Module):
    """Mean next-token loss of a batch; the decoder layers and the loss are what torch.compile sees."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.head_loss = self._head_loss

    @staticmethod
    def _head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def compile_parts(self) -> None:
        # layer by layer: one small graph serves all layers, so compiling takes seconds
        for layer in self.model.model.layers:
            layer.compile()
        self.head_loss = torch.compile(self._head_loss)

    def forget_compiled(self) -> None:
        for layer in self.model.model.layers:
            layer._compiled_call_impl = None
        self.head_loss = self._head_loss

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        return self.head_loss(hidden, self.model.lm_head.weight, tokens[:, 1:])


def warm_up(step: Step, tokens: Tensor, device: torch.device, use_compile: bool) -> bool:
    """Run forward and backward before the clock starts; returns whether compiled code is in use."""
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    if use_compile:
        try:
            step.compile_parts()
            with autocast:
                loss = step(tokens)
            loss.backward()
        except Exception as error:
            log(f"torch.compile failed, continuing without it: {str(error).splitlines()[0]}")
            step.forget_compiled()
            use_compile = False
    for _ in range(2):
        with autocast:
            loss = step(tokens)
        loss.backward()
    step.model.zero_grad(set_to_none=True)
    synchronize(device)
    return use_compile


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, windows: Tensor, batch: int) -> float:
    """exp of the mean next-token loss over all windows."""
    losses = []
    for rows in windows.split(batch):
        with torch.autocast(rows.device.type, dtype=torch.bfloat16):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none"))
    return math.exp(float(torch.cat(losses).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by prepare_data.py")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--seconds", type=float, default=170.0, help="training time, without compiling")
    parser.add_argument("--minutes", type=float, help="the same in minutes")
    parser.add_argument("--max-steps", type=int, help="stop earlier (for a quick trial)")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=800)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the saved checkpoint")
    parser.add_argument("--device")
    args = parser.parse_args()
    device = pick_device(args.device)
    budget = args.minutes * 60 if args.minutes else args.seconds
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.data / "tokenizer")
    train = load_documents(args.data, "train")
    windows = Windows(train, args.window + 1, device, args.seed)
    model: Any = build_model(args, tokenizer)
    model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    log(f"{parameters / 1e6:.2f}M parameters, {sum(map(len, train)) / 1e6:.1f}M training tokens, {device}")

    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95), fused=fused
    )
    step = Step(model)
    begin = time.monotonic()
    wanted = device.type == "cuda" if args.compile is None else args.compile
    compiled = warm_up(step, windows.sample(args.batch), device, wanted)
    warm_up_seconds = time.monotonic() - begin
    log(f"warm-up took {warm_up_seconds:.1f} s, compiled: {compiled}")

    history: list[dict[str, float]] = []
    running = torch.zeros((), device=device)
    steps = steps_logged = 0
    begin = last = time.monotonic()
    while True:
        elapsed = time.monotonic() - begin
        if elapsed >= budget or (args.max_steps is not None and steps >= args.max_steps):
            break
        factor = learning_rate_factor(elapsed / budget)
        if args.max_steps is not None:
            factor = min(factor, learning_rate_factor(steps / args.max_steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = step(windows.sample(args.batch))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.detach()
        steps += 1
        # the host must not run ahead of the clock that drives the schedule
        if steps % 8 == 0:
            synchronize(device)
        if steps % args.log_every == 0:
            now = time.monotonic()
            mean = float(running) / (steps - steps_logged)
            speed = (steps - steps_logged) * args.batch * args.window / (now - last)
            if not math.isfinite(mean):
                raise SystemExit(f"the loss is {mean} at step {steps}: use a lower --lr")
            log(f"step {steps} loss {mean:.4f} lr {args.lr * factor:.2e} {speed / 1e6:.3f}M tokens/s")
            history.append({"step": steps, "seconds": now - begin, "loss": mean, "tokens_per_second": speed})
            running.zero_()
            steps_logged, last = steps, now
    synchronize(device)
    seconds = time.monotonic() - begin

    step.forget_compiled()
    held_out = evenly_spaced_windows(load_documents(args.data, "heldout"), args.window, 256)
    model.eval()
    value = perplexity(model, torch.from_numpy(held_out).to(device), max(1, args.batch // 4))
    log(f"{steps} steps in {seconds:.1f} s, held-out perplexity {value:.4f} over {len(held_out)} windows")

    model.to(getattr(torch, args.dtype)).save_pretrained(args.out)
    save_tokenizer(args.data / "tokenizer", args.out)
    write_json(
        args.out / "training.json",
        {
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "machine": machine(device),
            "parameters": parameters,
            "seconds": seconds,
            "warm_up_seconds": warm_up_seconds,
            "compiled": compiled,
            "steps": steps,
            "tokens": steps * args.batch * args.window,
            "held_out_perplexity": value,
            "history": history,
        },
    )
    log(f"saved {args.out}")


if __name__ == "__main__":
    main()
