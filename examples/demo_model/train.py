"""Train the demo model: a Qwen3-style causal LM of about 6M parameters, on one GPU, in a few minutes.

Reads a jsonl or jsonl.xz corpus of {"text": ...} lines, trains a byte-level BPE tokenizer and then the model, and
writes a Hugging Face folder in bfloat16. Documents held out by `make_text.partition_of` are used for neither. The
schedule follows the clock, not a number of steps, so two runs do not give the same weights.

    python examples/demo_model/train.py --corpus demo_corpus.jsonl.xz --out demo-6m --seconds 200 --compile
    python examples/demo_model/train.py --corpus small.jsonl --out /tmp/smoke --seconds 20 --batch_size 4 --device cpu
"""

import argparse
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_text import partition_of, read_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
# The warm-up ends with whichever comes first; a CPU makes too few steps for the first.
WARMUP_STEPS = 200
WARMUP_SHARE = 0.1
# Steps before the clock of `--seconds` starts: compilation and the first allocations fall into them.
UNTIMED_STEPS = 3
FINAL_LR_SHARE = 0.02


def read_texts(corpus: Path) -> dict[str, list[str]]:
    """Return the texts of a corpus under "train", "calib" and "eval"."""
    texts: dict[str, list[str]] = {"train": [], "calib": [], "eval": []}
    for document in read_documents(corpus):
        texts[partition_of(document.text)].append(document.text)
    return texts


def train_tokenizer(texts: list[str], *, sample_chars: int, seed: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on documents drawn at random, about `sample_chars` characters."""
    sample, chars = [], 0
    for text in random.Random(seed).sample(texts, len(texts)):
        sample.append(text)
        chars += len(text)
        if chars >= sample_chars:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str], *, seed: int) -> Tensor:
    """Return the documents in random order as one (T,) int32 tensor, each one led by the end-of-text token."""
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    pieces = []
    # Batches bound the memory of the encodings, which is many times that of the token ids.
    for start in range(0, len(order), 2000):
        batch = [texts[index] for index in order[start : start + 2000]]
        for encoding in tokenizer.encode_batch_fast(batch):
            pieces.append(np.array([end_of_text, *encoding.ids], dtype=np.int32))
    return torch.from_numpy(np.concatenate(pieces))


def make_model() -> Qwen3ForCausalLM:
    """Return the untrained float32 model."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


def make_optimizer(model: Qwen3ForCausalLM, lr: float) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices, not on norms and embedding."""
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    undecayed = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def next_token_loss(body: torch.nn.Module, output_weight_VH: Tensor, tokens_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of predicting each token of a window from those before it.

    Logits are upcast to float32 before the softmax.
    """
    # A mask of None makes attention run with is_causal, hence the flash kernel. Left to itself the model builds the
    # mask tensor while it is compiled with torch < 2.14 (transformers.masking_utils._ignore_causal_mask_sdpa).
    mask = {"full_attention": None}
    hidden_BTH = body(input_ids=tokens_BT, attention_mask=mask, use_cache=False).last_hidden_state
    logits_BTV = F.linear(hidden_BTH[:, :-1], output_weight_VH)
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten())


def lr_share(step: int, elapsed: float) -> float:
    """Return the factor on the peak learning rate: linear warm-up, cosine decay by `elapsed` in [0, 1]."""
    warmup = min(1.0, max((step + 1) / WARMUP_STEPS, elapsed / WARMUP_SHARE))
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, elapsed)))
    return warmup * (FINAL_LR_SHARE + (1.0 - FINAL_LR_SHARE) * cosine)


def random_windows(tokens_T: Tensor, arguments: argparse.Namespace) -> Iterator[Tensor]:
    """Yield (batch_size, seqlen) int64 windows of the token stream on the device, without end."""
    device = torch.device(arguments.device)
    tokens_T = tokens_T.to(device)
    generator = torch.Generator(device=device).manual_seed(arguments.seed)
    offsets = torch.arange(arguments.seqlen, device=device)
    last_start = len(tokens_T) - arguments.seqlen
    while True:
        starts = torch.randint(0, last_start + 1, (arguments.batch_size, 1), device=device, generator=generator)
        yield tokens_T[starts + offsets].long()


def train(model: Qwen3ForCausalLM, windows: Iterator[Tensor], arguments: argparse.Namespace) -> None:
    """Train the model in place for `arguments.seconds` of wall-clock time."""
    body = torch.compile(model.model) if arguments.compile else model.model
    optimizer = make_optimizer(model, arguments.lr)
    device_type = torch.device(arguments.device).type
    started = last_report = time.monotonic()
    elapsed, step, seen = 0.0, 0, 0
    model.train()
    while elapsed < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * lr_share(step, elapsed)
        batch_BT = next(windows)
        with torch.autocast(device_type, torch.bfloat16):
            loss = next_token_loss(body, model.lm_head.weight, batch_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seen += batch_BT.numel()
        # Without a synchronisation now and then the clock would run ahead of the queued work.
        if step <= UNTIMED_STEPS or step % 20 == 0 or device_type == "cpu":
            loss_value = loss.item()
            now = time.monotonic()
            started = now if step <= UNTIMED_STEPS else started
            elapsed = (now - started) / arguments.seconds
            if step == UNTIMED_STEPS or now - last_report > arguments.report_seconds or elapsed >= 1.0:
                lr = optimizer.param_groups[0]["lr"]
                print(f"step {step} loss {loss_value:.3f} lr {lr:.1e} tokens {seen / 1e6:.1f}M {now - started:.0f}s")
                last_report = now


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, tokens_T: Tensor, *, seqlen: int, max_windows: int) -> tuple[float, int]:
    """Return the mean loss over the first windows of a token stream, and the number of windows."""
    model.eval()
    n_windows = min(max_windows, len(tokens_T) // seqlen)
    windows = tokens_T[: n_windows * seqlen].view(n_windows, seqlen).to(model.device).long()
    losses = [next_token_loss(model.model, model.lm_head.weight, window[None]) for window in windows]
    return torch.stack(losses).mean().item(), n_windows


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    fast.save_pretrained(out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="jsonl or jsonl.xz, one {text} a line")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--eval_text", type=Path, help="text file whose perplexity is printed too, e.g. eval.txt")
    parser.add_argument("--seconds", type=float, default=200.0, help="training time, without reading and tokenizing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true", help="run the decoder through torch.compile")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--tokenizer_chars", type=int, default=20_000_000, help="size of the tokenizer's sample")
    parser.add_argument("--report_seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()

    texts = read_texts(arguments.corpus)
    print({name: len(part) for name, part in texts.items()}, f"documents, {time.monotonic() - began:.0f}s")
    tokenizer = train_tokenizer(texts["train"], sample_chars=arguments.tokenizer_chars, seed=arguments.seed)
    print(f"tokenizer trained, {time.monotonic() - began:.0f}s")
    train_tokens_T = tokenize(tokenizer, texts["train"], seed=arguments.seed)
    held_out_tokens_T = tokenize(tokenizer, texts["eval"], seed=arguments.seed)
    print(f"{len(train_tokens_T) / 1e6:.1f}M tokens to train on, {time.monotonic() - began:.0f}s")

    model = make_model().to(arguments.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    train(model, random_windows(train_tokens_T, arguments), arguments)

    # What is evaluated is what is saved.
    model.to(torch.bfloat16)
    save(model, tokenizer, arguments.out)
    streams = {"held-out documents": held_out_tokens_T}
    if arguments.eval_text is not None:
        ids = tokenizer.encode(arguments.eval_text.read_text(encoding="utf-8")).ids
        streams[arguments.eval_text.name] = torch.tensor(ids, dtype=torch.int32)
    for name, tokens_T in streams.items():
        loss, n_windows = evaluate(model, tokens_T, seqlen=arguments.seqlen, max_windows=256)
        windows = f"{n_windows} windows of {arguments.seqlen}"
        print(f"{name}: loss {loss:.4f} perplexity {math.exp(loss):.2f} ({windows}), {time.monotonic() - began:.0f}s")


if __name__ == "__main__":
    main()
