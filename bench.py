"""Ratios against the plain way, measured in one run on one machine.

    python bench.py                    # all
    python bench.py nanojepa_step      # one

nanojepa_step        isolated views as causal rows, against one dense-masked row in padded batches of random order
nanojepa_mask        the same, both sides on the same length-bucketed batches: the mask alone
nanojepa_llm_jepa    the same step, against three forward passes (text, question, answer) as LLM-JEPA first did
nanojepa_overhead    answer_context = question with the latent loss, against a plain language model (ratio = cost)
attention            model.attend against SDPA at the shape of nanojepa-small, forward and backward
generate             decoding with the KV cache, against recomputing the whole row for every token
tjepa_packed         T-JEPA's first phase on packed documents, against padded ones (shape of tjepa-small)
speaker_cache        the Speaker writing 256 tokens, against recomputing all of them for every token (tjepa-speak)

Tokens are real ones, never padding; the answer rows that only the latent needs count as cost, not as tokens.
"""

import dataclasses
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import config as cfg
import data
from jobs import strip
from model import TJEPA, NanoJEPA, Speaker, attend, configure_optimizers, question_row
from runs import pick_device, pick_dtype

NAMES = Literal["all", "nanojepa_step", "nanojepa_mask", "nanojepa_llm_jepa", "nanojepa_overhead", "attention",
                "generate", "tjepa_packed", "speaker_cache"]  # fmt: skip


@dataclass
class Args:
    """Measures ours / plain, interleaved, the median of --repeats rounds."""

    name: Annotated[NAMES, tyro.conf.Positional] = "all"
    data_dir: str = ""  # GSM8K folder; empty: synthetic problems
    preset: str = "nanojepa-small"  # whose network
    repeats: int = 5  # rounds
    seconds: float = 3.0  # per side and round
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"

    def __post_init__(self):
        for name in ("repeats", "seconds"):
            cfg.check(self, name, getattr(self, name) > 0, "must be positive")


class Bench:
    """Problems, network shapes and the clock that all comparisons share."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        self.config = dataclasses.replace(cfg.pick_preset(args.preset), dropout=0.0)
        dataset = "gsm8k" if args.data_dir else "synthetic"
        self.problems = data.load_problems(dataset, "train", args.data_dir, 2000)
        if self.config.tokenizer == "gpt2":
            self.tokenizer = data.gpt2_tokenizer()
        else:
            texts = [t for p in self.problems for t in (p["question"], data.answer_text(p, "solution"))]
            self.tokenizer = data.train_bpe(texts, self.config.vocab_size)

    def autocast(self):
        on = self.dtype != torch.float32
        return torch.autocast(self.device.split(":")[0], self.dtype) if on else nullcontext()

    def trainer(self, step_losses=None, packed=False, bucketed=True, **fields):
        """A function that trains one step on the next batch and returns its question and answer tokens."""
        config = dataclasses.replace(self.config, vocab_size=self.tokenizer.vocab_size, **fields)
        torch.manual_seed(0)
        model = NanoJEPA(config).to(self.device)
        optimizer = configure_optimizers(model, config)
        examples = data.encode_problems(self.problems, self.tokenizer, config)
        batches = data.Batches(examples, config)
        random = [examples[i : i + config.batch_size] for i in range(0, len(examples), config.batch_size)]
        count = [0]

        def step():
            part = batches(count[0]) if bucketed else random[count[0] % (len(random) - 1)]
            count[0] += 1
            batch = data.collate(part, config, self.device, packed=packed)
            with self.autocast():
                loss = step_losses(model, part, batch) if step_losses else model(strip(batch))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return sum(len(e["question"]) + len(e["answer"]) + 2 for e in part)

        return step

    def compare(self, ours, plain, unit="tokens/s") -> dict:
        """Runs both in turn; ours and plain are functions that do a piece of work and return its size."""
        rates = {"ours": [], "plain": []}
        ours(), plain()
        for _ in range(self.args.repeats):
            for name, work in (("ours", ours), ("plain", plain)):
                start, done = time.perf_counter(), 0
                while time.perf_counter() - start < self.args.seconds:
                    done += work()
                    if self.device.startswith("cuda"):
                        torch.cuda.synchronize()
                rates[name].append(done / (time.perf_counter() - start))
        a, b = (sorted(rates[k])[len(rates[k]) // 2] for k in ("ours", "plain"))
        return {"ours": round(a, 1), "plain": round(b, 1), "ratio": round(a / b, 3), "unit": unit}

    def nanojepa_step(self):
        fields = dict(answer_context="isolated", lambda_jepa=1.0)
        return self.compare(self.trainer(**fields), self.trainer(packed=True, bucketed=False, **fields))

    def nanojepa_mask(self):
        fields = dict(answer_context="isolated", lambda_jepa=1.0)
        return self.compare(self.trainer(**fields), self.trainer(packed=True, **fields))

    def nanojepa_llm_jepa(self):
        def three_passes(model, part, batch):
            """One causal row for the token loss, then question and answer once more for the latents."""
            lm_loss = model.token_loss(model.transformer(model.embed(batch["idx"]), is_causal=True),
                                       batch["loss_at"], batch["targets"]) / len(batch["targets"])
            pred = model.predict_latent([question_row(e["question"], model.pred_id) for e in part])
            target = model.target_latent(batch["target_idx"], batch["target_pool"])
            return lm_loss + 1 - F.cosine_similarity(pred, target, dim=-1).mean()

        return self.compare(self.trainer(answer_context="isolated", lambda_jepa=1.0),
                            self.trainer(three_passes, answer_context="question", lambda_jepa=1.0))

    def nanojepa_overhead(self):
        """ratio below 1: what the latent loss costs; 1 / ratio is the cost of a token."""
        return self.compare(self.trainer(answer_context="question", lambda_jepa=1.0),
                            self.trainer(answer_context="question", lambda_jepa=0.0))

    def attention(self):
        c = self.config
        shape = (c.batch_size, 170, c.n_head, c.n_embd // c.n_head)
        q, k, v = (torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2).requires_grad_()
                   for _ in range(3))

        def run(function):
            def work():
                function(q, k, v, is_causal=True).sum().backward()
                return shape[0] * shape[1]

            return work

        return self.compare(run(attend), run(F.scaled_dot_product_attention))

    def tjepa_packed(self):
        config = dataclasses.replace(cfg.pick_preset("tjepa-small"), vocab_size=self.tokenizer.vocab_size)
        documents = [d for p in self.problems
                     for d in data.encode_document(data.document_text(p), self.tokenizer, config.block_size)]
        packed, rng = data.Documents(documents, config), np.random.default_rng(0)
        n = round(config.batch_size * config.block_size / np.mean([len(d["tokens"]) for d in documents]))
        padded = [[[d] for d in documents[i : i + n]] for i in range(0, len(documents) - n, n)]  # in random order

        def trainer(batch_of):
            torch.manual_seed(0)
            model, count = TJEPA(config).to(self.device), [0]
            optimizer = configure_optimizers(model, config)

            def step():
                batch = batch_of(count[0])
                count[0] += 1
                with self.autocast():
                    loss = model(strip(batch))["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                model.update_target(0.996)
                return batch["n_tokens"]

            return step

        return self.compare(trainer(lambda i: packed(i, self.device)), trainer(
            lambda i: data.collate_documents(padded[i % len(padded)], config, rng, self.device)))

    @torch.no_grad()
    def speaker_cache(self):
        config = dataclasses.replace(cfg.pick_preset("tjepa-speak"), vocab_size=self.tokenizer.vocab_size, dropout=0.0,
                                     context_dim=256)
        torch.manual_seed(0)
        speaker, n = Speaker(config).to(self.device).eval(), 256
        speaker.embed.weight[speaker.eos_id] = 0.0  # never the likeliest: all 256 tokens are written
        context = torch.randn(8, 100, config.context_dim, device=self.device)
        allowed = torch.ones(context.shape[:2], dtype=torch.bool, device=self.device)

        def recompute():
            idx = torch.full((len(context), 1), speaker.eos_id, device=self.device)
            for _ in range(n):
                h = speaker.transformer(speaker.embed(idx), is_causal=True, context=speaker.prepare(context),
                                        context_allowed=allowed)[:, -1]
                token = F.linear(h, speaker.embed.weight[: speaker.eos_id]).argmax(-1, keepdim=True)
                idx = torch.cat((idx, token), dim=1)
            return n * len(context)

        def cached():
            written = speaker.generate(context, allowed, max_new_tokens=n)
            assert all(len(row) == n for row in written), "the Speaker stopped early: nothing to compare"
            return n * len(context)

        return self.compare(cached, recompute)

    @torch.no_grad()
    def generate(self):
        torch.manual_seed(0)
        model = NanoJEPA(dataclasses.replace(self.config, vocab_size=self.tokenizer.vocab_size,
                                             answer_context="question")).to(self.device).eval()
        rows = [question_row(self.tokenizer.encode(p["question"]), model.pred_id) for p in self.problems[:16]]
        length, new = min(map(len, rows)), 100

        def cached():
            model.generate([r[: length - 1] for r in rows], new)
            return new * len(rows)

        def recompute():
            idx = torch.tensor([r[:length] for r in rows], device=self.device)
            for _ in range(new):
                h = model.transformer(model.embed(idx), is_causal=True)[:, -1]
                token = F.linear(h, model.embed.weight[: model.pred_id]).argmax(-1, keepdim=True)
                idx = torch.cat((idx, token), dim=1)
            return new * len(rows)

        return self.compare(cached, recompute)


def main():
    args = tyro.cli(Args)
    try:
        bench = Bench(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    results = {}
    for name in get_args(NAMES)[1:] if args.name == "all" else [args.name]:
        results[name] = r = getattr(bench, name)()
        print(f"{name:20} ours {r['ours']:>12,} plain {r['plain']:>12,} {r['unit']}  ratio {r['ratio']}", flush=True)
    device = torch.cuda.get_device_name() if bench.device.startswith("cuda") else bench.device
    print(json.dumps({"bench": results, "device": device, "dtype": str(bench.dtype)[6:],
                      "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    sys.exit(main())
