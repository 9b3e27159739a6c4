"""The recipe: one pair of models, one file, one run folder.

Every section of a recipe is a dataclass here; the string under a field is its help on the command line. `config.py`
reads recipes from YAML and flags. Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

PATH = {"path": True}
"""Marks fields that name a file or folder (or a hub id): looked for beside the recipe and in the repository too."""


def at_least(low: float, default: Any) -> Any:
    """A field whose value (or each entry of it) is not below `low`."""
    return field(default=default, metadata={"low": low})


def between(low: float, high: float, default: Any) -> Any:
    """A field whose value lies in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class SamplingConfig:
    """How tokens are drawn from a model's distribution."""

    temperature: float = at_least(0.0, 1.0)
    """divides the logits; 0 means greedy decoding"""
    top_k: int = at_least(0, 0)
    """keep the k most likely tokens; 0 keeps all"""
    top_p: float = between(0.0, 1.0, 1.0)
    """keep the smallest set of tokens whose probability reaches this; 1 keeps all"""
    min_p: float = between(0.0, 1.0, 0.0)
    """drop tokens less likely than this share of the most likely one; 0 drops none"""
    repetition_penalty: float = at_least(0.0, 1.0)
    """divides the positive logits of tokens already seen and multiplies the negative ones; 1 is off"""


@dataclass
class TargetConfig:
    """The target: the model whose decoding is made faster, exactly as it is served."""

    path: str = field(default="checkpoints/reference-target", metadata=PATH)
    """a Hugging Face model folder or hub id"""
    revision: str | None = None
    """branch, tag or commit of a hub model"""
    dtype: str = "auto"
    """auto (as stored), float32, bfloat16, float16 or float64"""
    device_map: str | dict[str, Any] | None = None
    """passed to transformers: auto, cuda:0, cpu, or a map of modules to devices"""
    quantization: dict[str, Any] | None = None
    """keys of a transformers quantization config, with its quant_method (bitsandbytes, gptq, awq, fp8, ...)"""
    trust_remote_code: bool = False
    """let the model's own Python code run on this machine"""


@dataclass
class LoraConfig:
    """Low-rank adaptation of a drafter through peft, merged into the weights when training ends."""

    r: int = at_least(1, 16)
    """rank of the update"""
    alpha: int = 32
    """scale of the update is alpha / r"""
    dropout: float = between(0.0, 1.0, 0.0)
    """dropout on the input of the update"""
    target_modules: str | list[str] = "all-linear"
    """names of the layers to adapt"""


@dataclass
class BlockConfig:
    """The one block of a LongSpec drafter; embedding and head are the target's."""

    window: int = at_least(1, 512)
    """tokens that its self-attention sees: what it keeps of a text never grows beyond them"""
    kv_layer: int | None = None
    """layer of the target whose keys and values it reads; by default the last one of full attention"""
    intermediate_size: int | None = at_least(1, None)
    """width of its SwiGLU; the target's by default. More than that costs little beside the target's own reading"""
    final_norm: bool = True
    """a norm before the head, which starts as the target's; the published block has none"""
    warm_start: int | None = None
    """layer of the target that its weights start from (queries of the target's keys: from kv_layer); by default none"""
    copying: bool = False
    """fit its windowed attention and its queries to the target's own, by least squares on some of the training text, so
    that it copies from its first step (models/longspec_copying.py); pays where a training is short"""
    zero_outputs: bool = False
    """start its three output projections at zero, so that the first step already sees the token's own prediction"""
    depth: int = at_least(1, 5)
    """deepest step that it is trained to draft at: the k-th token of a round is drafted where the target has not read
    the last k, so each row trains at one of 1 .. depth (flash noisy training); 1 trains the first step alone"""


@dataclass
class DrafterConfig:
    """The drafter: the small model that proposes tokens."""

    kind: Literal["new", "cut", "pretrained", "longspec"] = "cut"
    """new (from `config`, random weights), cut (chosen layers of the target), pretrained (`path`), longspec (`block`: a
    block that reads the target's keys and values, for long contexts)"""
    path: str | None = field(default=None, metadata=PATH)
    """pretrained: a Hugging Face causal LM with the target's tokenizer; elsewhere: a trained drafter to use"""
    init_from: str | None = field(default=None, metadata=PATH)
    """a drafter checkpoint to continue from, whatever its kind"""
    layers: list[int] = field(default_factory=list)
    """cut: which layers of the target to keep, counted from 0; negative numbers count from the end"""
    fold: int = at_least(0, 0)
    """cut: so many of the target's first layers, each token read alone, become the drafter's input embeddings"""
    abreast: int = at_least(1, 1)
    """cut: so many of the chosen layers at a time, in their order, become one wide layer, each a share of its heads"""
    config: dict[str, Any] = field(default_factory=dict)
    """new: keys of a transformers config, e.g. num_hidden_layers; the rest is taken from the target"""
    block: BlockConfig = field(default_factory=BlockConfig)
    """longspec: its one block"""
    lora: LoraConfig | None = None
    """train low-rank updates only, merged when training ends"""
    dtype: str = "float32"
    """dtype that the drafter is trained in; bf16: true under training.arguments gives mixed precision"""


@dataclass
class PromptsConfig:
    """Where the prompts come from and how they are split."""

    source: Literal["reference", "file", "hub"] = "reference"
    """reference (the built-in tasks), file (JSONL, JSON, Parquet, text; taken when a path is given) or hub"""
    path: str | None = field(default=None, metadata=PATH)
    """the file, or the hub id; `id:config` names a configuration of it"""
    hub_split: str = "train"
    """hub: which split of the data set to read"""
    preset: Literal[
        "auto",
        "humaneval",
        "mbpp",
        "gsm8k",
        "gsm8k_self_correct",
        "mt_bench",
        "mt_redundant",
        "spec_bench",
        "extraction",
        "alpaca",
        "messages",
        "text",
        "fields",
    ] = "auto"
    """shape of the rows; auto recognises it from the field names, mt_redundant and gsm8k_self_correct must be named"""
    fields: dict[str, str] = field(default_factory=dict)
    """preset fields: which fields hold prompt, turns or messages (chat) or text (to be continued without a chat
    template), and answer (recorded, for logged responses), system, tools, task, id, reference"""
    mixture: dict[str, int] = field(default_factory=dict)
    """reference: how many prompts of each task kind; empty takes a balanced default"""
    length: int = at_least(16, 512)
    """reference: length in tokens of the prompts of tasks that can be made at any length"""
    lengths: dict[str, int] = field(default_factory=dict)
    """reference: entries of the mixture that are made at another length, e.g. {revise: 160}"""
    limit: int | None = at_least(1, None)
    """use at most this many prompts"""
    max_tokens: int | None = at_least(1, None)
    """leave out prompts longer than this; without it a prompt that fills the target's context is an error"""
    held_out: float = between(0.0, 0.45, 0.1)
    """share of conversations held out for test, and again as many for tuning"""
    near_duplicate: float = between(0.0, 1.0, 0.8)
    """Jaccard similarity from which two prompts count as the same; 1 removes exact copies only"""
    system: str | None = None
    """system prompt put before conversations that have none"""
    seed: int = 0
    """seed of the choice of prompts and of the split, apart from the recipe's so that training seeds share a split"""

    def __post_init__(self) -> None:
        if self.path is not None and self.source == "reference":
            self.source = "file"


@dataclass
class ResponsesConfig:
    """The target's answers, which everything is trained on."""

    source: Literal["generate", "logged"] = "generate"
    """generate (the target answers) or logged (the file already holds answers of the target)"""
    max_new_tokens: int = at_least(1, 256)
    """longest answer, in tokens"""
    batch_size: int = at_least(1, 16)
    """prompts answered together; the rows do not depend on it"""
    shard_rows: int = at_least(1, 64)
    """rows of one file; the unit of work that is done again after a crash"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """how the target draws its answers; the pair is tuned for this setting"""
    stop: list[str] = field(default_factory=list)
    """texts that end an answer, here and in evaluation, beside the target's end tokens"""


@dataclass
class PositionsConfig:
    """Where rows stand while a LongSpec drafter is trained: short rows train the positions of long texts."""

    kind: Literal["anchor_offset", "multi_gap", "plain"] = "anchor_offset"
    """anchor_offset (all but the first tokens of a row move by one random offset), multi_gap (several jumps, the first
    there and the others anywhere) or plain (where they are)"""
    anchors: int = at_least(0, 4)
    """first tokens of a row that keep their places"""
    served: int | None = at_least(2, None)
    """longest context that will be served: rows move up to there; by default all positions that the target has"""
    gaps: int = at_least(1, 3)
    """multi_gap: jumps of a row"""
    share: float = between(0.0, 1.0, 1.0)
    """share of the rows that move"""
    settling: int = at_least(0, 8)
    """tokens behind each jump whose predictions are not learnt: the target itself is astray there"""


@dataclass
class TrainingConfig:
    """Distillation of the drafter."""

    losses: dict[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})
    """loss names and weights: forward_kl, reverse_kl, jensen_shannon, total_variation, cross_entropy"""
    temperature: float = at_least(0.01, 1.0)
    """divides both models' logits in the loss"""
    on_policy_fraction: float = between(0.0, 1.0, 0.0)
    """share of the steps in which the drafter writes and the target scores"""
    on_policy_tokens: int = at_least(1, 64)
    """length of a continuation that the drafter writes, in tokens; the same on all ranks"""
    max_length: int | None = at_least(2, None)
    """cut sequences to this many tokens; the default is the smaller context of the two models"""
    chunk_tokens: int = at_least(1, 256)
    """tokens whose logits exist at one time; lower it when memory is short"""
    tau_evaluations: int = at_least(0, 10)
    """how often real tokens per round are measured on held-out prompts while training; 0 never"""
    tau_prompts: int = at_least(1, 32)
    """held-out prompts used for it"""
    tau_length: int = at_least(1, 5)
    """drafted tokens per round in it"""
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    """longspec: positions that rows are trained at"""
    packing: bool = True
    """longspec: lay the rows of a batch end to end, each seeing itself alone, instead of padding them"""
    readings: Literal["live", "stored"] = "live"
    """longspec: what it learns of the target is computed in every step (live), at positions drawn anew, or read from
    RUN/readings (stored), which data_prep/readings.py makes once, at positions drawn once"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """passed on to transformers.TrainingArguments: learning_rate, num_train_epochs, bf16, deepspeed, ..."""


@dataclass
class TracesConfig:
    """Records of what the target would accept of the drafter's proposals."""

    sampling: SamplingConfig | None = None
    """decoding setting that the traces are made for; that of the responses by default"""
    top_k: int = at_least(1, 16)
    """most likely tokens of both models stored per position"""
    temperatures: list[float] = field(default_factory=lambda: [0.5, 0.7, 1.0])
    """temperatures at which log Z is stored"""
    run_length: int = at_least(0, 11)
    """drafted tokens recorded beyond every rejection (R): replay is exact for rules that draft up to R + 1; 0 none"""
    shard_rows: int = at_least(1, 64)
    """rows of one file; the unit of work that is done again after a crash"""
    batch_size: int = at_least(1, 8)
    """responses traced together; the rows do not depend on it"""
    scores: list[str] = field(default_factory=list)
    """acceptance heads, by path, whose scores are stored too (confidence, entropy and max_q always are)"""


@dataclass
class HeadConfig:
    """The acceptance head of SpecDec++: predicts whether the target will accept the next drafted token."""

    state: Literal["producing", "consumed"] = "producing"
    """the drafter state that is read: the one that produced the token, or the one after reading it (published)"""
    depth: int = at_least(0, 3)
    """residual SiLU blocks before the output; 0 is a linear probe"""
    tied: bool = False
    """one set of weights for all blocks, as in the published code"""
    features: list[Literal["log_q", "entropy", "step", "token"]] = field(
        default_factory=lambda: ["log_q", "entropy", "token"]
    )
    """inputs beside the state: log_q of the token, entropy of q, step within the round, which token it is"""
    w_acc: float = at_least(0.0, 1.0)
    """weight of the loss on accepted tokens"""
    w_rej: float = at_least(0.0, 1.0)
    """weight of the loss on rejected tokens"""
    mixing: float = between(0.0, 1.0, 0.15)
    """data mixed: share r of the positions that keep the response's token, all others take the drafter's; drawn anew
    each epoch"""
    data: Literal["mixed", "exact", "expected", "rounds"] = "exact"
    """exact (each drafted token after the response's own prefix), expected (all likely tokens there, weighing their
    probability; state producing, plain temperatures), mixed (published: token mixing, state consumed only)
    or rounds (the positions and steps of drafting rounds, as when decoding)"""
    init_from: str | None = field(default=None, metadata=PATH)
    """a head to continue from"""
    calibrated: bool = True
    """undo the loss weights in the scores, so that they are probabilities; false is the published form"""
    min_length: int = at_least(1, 1)
    """fewest tokens drafted per round"""
    max_length: int = at_least(1, 20)
    """most tokens drafted per round"""
    threshold: float = between(0.0, 1.0, 0.7)
    """drafting stops when the predicted probability of a rejection so far exceeds this (h)"""
    folder: str = "head"
    """its folder in the run folder; another name keeps several heads of a pair side by side"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """passed on to transformers.TrainingArguments"""


@dataclass
class EvaluateConfig:
    """Sweeps by replay, then real runs of the best settings."""

    methods: list[str] | None = None
    """expressions to run, e.g. "Model(drafter, length=5)"; by default the best of each kind found by replay; a class of
    your own by its dotted name, e.g. "my_package.MyDrafter(drafter, k=3)", with --allow-code"""
    members: dict[str, str] = field(default_factory=dict)
    """more models that methods name, as paths by name, e.g. {"small": "runs/small/drafter"} for a cascade"""
    max_length: int = between(1, 64, 12)
    """fixed lengths 1..max_length are swept"""
    thresholds: list[float] = field(
        default_factory=lambda: [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
        metadata={"low": 0.0, "high": 1.0},
    )
    """thresholds swept for acceptance heads and confidence"""
    samplings: list[SamplingConfig] = field(default_factory=list)
    """decoding settings to measure; that of the responses by default"""
    prompts_per_task: int = at_least(1, 8)
    """test prompts of each task that are really run"""
    max_new_tokens: int = at_least(2, 128)
    """longest answer in real runs, in tokens"""
    contexts: list[int] = field(default_factory=list, metadata={"low": 64})
    """instead of the prompts themselves, their first turns behind so much other text that they have so many tokens,
    e.g. [1024, 8192]: the same questions at every length"""
    batch_size: int = at_least(1, 1)
    """sequences decoded together in real runs"""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"low": 1})
    """batch sizes of a second study: throughput, latency, where speculation stops paying; [] or [1] leaves it out"""
    repeats: int = at_least(1, 3)
    """interleaved repetitions of every method"""
    warmup: int = at_least(0, 1)
    """prompts run by every method before anything is timed"""
    dtype: str = "auto"
    """dtype in which speed is measured; auto takes bfloat16 where the hardware has it"""
    top: int = at_least(1, 2)
    """settings of each kind that are really run after the sweep"""
    trees: bool = False
    """find the shape of a tree that should be fastest, by costs and acceptance on tuning prompts, and run it too"""
    min_speedup: float = 1.05
    """lower bound of the speed-up's interval from which the verdict is to deploy"""
    bootstrap: int = at_least(100, 2000)
    """resamples behind every interval"""
    compile: bool = False
    """run target and drafter as graphs, compiled and on a GPU captured, after a minute or so of compilation"""
    tolerance: float = at_least(0.0, 4.0)
    """fp32 divergences pass when the top-1/top-2 gap is at most this times the measured logit noise"""
    synthetic_acceptance: list[float] | None = field(default=None, metadata={"low": 0.0, "high": 1.0})
    """measure speed alone, the k-th drafted token being accepted at the k-th of these rates (the last one holds on),
    e.g. [0.8, 0.7]; the texts then mean nothing and are neither checked nor kept"""
    random_weights: bool = False
    """with synthetic_acceptance: make the weights of both models up; of their folders only config.json and the
    tokenizer are read"""
    answers: int = at_least(100, 400)
    """lossless: sampled answers of each chi-square test, up to 16 tokens each"""


@dataclass
class ContextConfig:
    """Approximate decoding of long prompts: what cutting them down costs in answers and gives in time and memory."""

    lengths: list[int] = field(default_factory=list, metadata={"low": 256})
    """tokens of the prompts, e.g. [2048, 4096]; naming any (or a path) makes `drafttrain evaluate` this study alone"""
    path: str | None = field(default=None, metadata=PATH)
    """JSONL file of prompts in the shape of RULER (input, outputs) or LongBench (context, input, answers)"""
    kinds: list[str] = field(
        default_factory=lambda: ["recall/single/prose", "recall/multi_key/prose", "recall/multi_query/noise"]
    )
    """tasks of the reference world (drafttrain/evaluation/tasks)"""
    prompts: int = at_least(1, 8)
    """prompts of each task and length, or of the file"""
    answer_prefix: bool = False
    """give the answer up to its first value, as RULER does"""
    methods: list[str] = field(default_factory=lambda: ["kv_dropping", "snapkv", "streaming", "prompt_compression"])
    """of kv_dropping, snapkv, streaming, random, oracle (keys are dropped), prompt_compression, chunks, window, both"""
    budgets: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5], metadata={"low": 0.0, "high": 1.0})
    """shares of the prompt that are kept"""
    shape: Literal["uniform", "pyramid"] = "uniform"
    """of the budget over the layers, where keys are dropped"""
    positions: Literal["compact", "original"] = "compact"
    """of a compressed prompt's tokens"""
    documents: str = "\n"
    """regular expression of what ends a document of a prompt: a line break, or e.g. (?=Document), where one begins"""
    min_per_document: int = at_least(0, 0)
    """tokens that a compressed prompt keeps of every document; 0 looks at no documents"""
    bypass: bool = False
    """measure first from which length compression pays, and read shorter prompts whole"""
    lookahead: int = between(1, 512, 16)
    """most tokens that the drafter writes before the target reads"""
    min_confidence: float = between(0.0, 1.0, 0.0)
    """the lookahead ends with a token that the drafter gives less probability"""
    settled: float = between(0.0, 1.0, 0.0)
    """the lookahead ends when a token changed less than this share of what the drafter attends to most; 0 is off"""
    lookaheads: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"low": 1})
    """lengths of the lookahead at which kv_dropping is compared, the longest with both adaptive ends, too"""
    decoding: str = "Autoregressive()"
    """expression of what decodes on, e.g. Model(drafter, length=5)"""
    max_new_tokens: int = at_least(1, 64)
    """longest answer, where a file does not say it"""


@dataclass
class ExportConfig:
    """What is written for which consumer."""

    to: Literal["transformers", "vllm", "sglang"] = "transformers"
    """transformers, vllm or sglang"""
    output: str | None = None
    """folder to write; `export/<to>` in the run folder by default"""


@dataclass
class CorpusConfig:
    """The reference world: the interpreter's standard library and procedural tasks."""

    vocab_size: int = between(300, 65536, 4096)
    """entries of the byte-level BPE tokenizer; the corpus keeps token ids in 16 bits"""
    task_documents: int = at_least(0, 4000)
    """task examples that the tokenizer is trained on beside the code"""
    tokenizer: str | None = field(default=None, metadata=PATH)
    """a model whose tokenizer is taken instead of training one: for a drafter, its target's"""
    data_table_weight: float = at_least(0.0, 0.05)
    """weight of modules that are data tables"""
    seed: int = 0
    """seed of the task examples"""


@dataclass
class StageConfig:
    """A stretch of pretraining with one mixture."""

    steps: int = at_least(1, 1)
    """optimizer steps, one block each"""
    tokens: int = at_least(1, 4096)
    """tokens of a block; it holds tokens // length rows, and one at least"""
    lengths: dict[int, float] = field(default_factory=dict)
    """row length -> share of the steps"""
    mixture: dict[str, float] = field(default_factory=dict)
    """code, echo, a task or a kind -> share of the segments drawn"""
    jumps: float = between(0.0, 1.0, 0.0)
    """share of the rows whose positions jump ahead at one or two places, so that short rows also train the long
    distances between positions (the anchor-offset idea, with several gaps)"""
    choice_weight: float = at_least(0.0, 2.0)
    """what a token of an answer weighs that copying on would not have told (others weigh 1): well above 1 while
    choosing is being learnt; about 1 at last, or the model departs from a copy too early"""


@dataclass
class PretrainConfig:
    """Training on the stream of the reference world: the reference target, or a drafter before it is distilled."""

    of: Literal["target", "drafter"] = "target"
    """target (`model`, from nothing, on the text) or drafter (the drafter section's, on the target's distributions)"""
    model: dict[str, Any] = field(default_factory=dict)
    """of a target: keys of transformers.LlamaConfig"""
    stages: list[StageConfig] = field(default_factory=list)
    """stages of the stream: steps, tokens, lengths, mixture, jumps, choice_weight (training/pretrain_data.py)"""
    learning_rate: float = at_least(0.0, 0.004)
    """peak learning rate (Muon scaled to AdamW's update size)"""
    warmup_steps: int = at_least(0, 100)
    """steps in which the learning rate rises"""
    decay_steps: int = at_least(0, 400)
    """steps in which it falls to zero, at the end"""
    save_every: int = at_least(1, 200)
    """steps between checkpoints and probes"""
    init_from: str | None = field(default=None, metadata=PATH)
    """of a target: continue from the weights of this folder"""
    seed: int = 0
    """seed of weights and data order"""


@dataclass
class Recipe:
    """A model pair and everything that is done with it."""

    target: TargetConfig = field(default_factory=TargetConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    responses: ResponsesConfig = field(default_factory=ResponsesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    seed: int = 0
    """seed of everything that has none of its own"""
