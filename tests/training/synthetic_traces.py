"""Trace records of two tiny models, made one forward pass a response: slow, short and independent of data_prep."""

from __future__ import annotations

import torch

from drafttrain.models.fingerprint import fingerprint
from drafttrain.ops.random import sample, uniform
from drafttrain.records import SCHEMAS, ShardedWriter

TOP_K = 4


def residual(p_V, q_V):
    rest_V = (q_V - p_V).clamp_min(0)
    return rest_V if float(rest_V.sum()) > 0 else q_V


@torch.no_grad()
def continue_greedily(model, tokens, count):
    added = []
    for _ in range(count):
        added.append(int(model(torch.tensor([tokens + added])).logits[0, -1].argmax()))
    return added


@torch.no_grad()
def trace_record(target, drafter, prompt, length, *, number=0, split="train", temperature=1.0, run_length=0):
    """One record by the schema: X from the target, Y coupled to it."""
    greedy = temperature == 0
    tokens, rows, scale = list(prompt), [], 1.0 if greedy else temperature
    stored = {f"{model}_top_{what}": [] for model in "pq" for what in ("ids", "logits")} | {
        "log_z_p": [],
        "log_z_q": [],
    }
    for i in range(length):
        p_V = (target(torch.tensor([tokens])).logits[0, -1].double() / scale).softmax(-1)
        q_V = (drafter(torch.tensor([tokens])).logits[0, -1].double() / scale).softmax(-1)
        u = uniform(1, "synthetic", torch.tensor([number] * 3), torch.arange(3) + 3 * i)
        x = int(p_V.argmax()) if greedy else int(sample(p_V, u[0]))
        keep = float(u[1]) < float(q_V[x] / p_V[x])
        y = int(q_V.argmax()) if greedy else x if keep else int(sample(residual(p_V, q_V), u[2]))
        entropy = float(torch.special.entr(q_V).sum())
        rows.append((x, y, float(p_V[y].log()), float(q_V[y].log()), float(torch.minimum(p_V, q_V).sum()), entropy))
        for name, mass_V in (("p", p_V), ("q", q_V)):
            logits_k, ids_k = (scale * mass_V.log() + 1.0).topk(TOP_K)  # logits of another log Z than zero
            stored[f"{name}_top_ids"] += ids_k.tolist()
            stored[f"{name}_top_logits"] += logits_k.tolist()
            stored[f"log_z_{name}"].append(1.0 / scale)
        tokens.append(x)
    x, y, log_p, log_q, overlap, entropy = (list(column) for column in zip(*rows, strict=True)) if rows else [[]] * 6
    rejected = [i for i in range(length) if x[i] != y[i]]
    runs = [continue_greedily(drafter, [*prompt, *x[:i], y[i]], run_length) for i in rejected]
    flat = [token for run in runs for token in run]
    empty = {name: [] for name in SCHEMAS["traces"].names}
    return (
        empty
        | stored
        | {
            "prompt_id": f"p{number}",
            "split": split,
            "task": "code",
            "source": "synthetic",
            "turn": 0,
            "prompt_ids": list(prompt),
            "response_ids": x,
            "draft_ids": y,
            "log_p": log_p,
            "log_q": log_q,
            "overlap": overlap,
            "entropy": entropy,
            "run_ids": flat,
            "run_log_q": [-0.5] * len(flat),
            "run_scores": [1.5] * len(flat),
            "scores": entropy,
        }
    )


def make_records(target, drafter, count=12, *, tune=4, length=10, temperature=1.0, run_length=0, seed=0):
    """Records of random prompts with responses of unequal length, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = target.config.vocab_size
    records = []
    for number in range(count + tune):
        prompt = torch.randint(6, vocabulary, (3 + number % 4,), generator=generator).tolist()
        size = 0 if number == 1 else length + number % 5
        split = "train" if number < count else "tune"
        settings = {"number": number, "split": split, "temperature": temperature, "run_length": run_length}
        records.append(trace_record(target, drafter, prompt, size, **settings))
    return records


def make_manifest(target, drafter, tokenizer, *, temperature=1.0, run_length=0):
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    pair = {"target": fingerprint(target, tokenizer).to_dict(), "drafter": fingerprint(drafter, tokenizer).to_dict()}
    return {
        "kind": "traces",
        "sampling": sampling,
        "fingerprints": pair,
        "run_length": run_length,
        "scores": ["entropy"],
        "top_k": TOP_K,
        "temperatures": [0.5, 1.0] if temperature == 0 else [temperature],
    }


def write_traces(folder, records, manifest):
    writer = ShardedWriter(folder, manifest, len(records), 8)
    for shard in writer.pending():
        writer.write(shard, [records[row] for row in writer.source_range(shard)])
    writer.finish()
