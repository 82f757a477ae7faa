"""The documentation against the code: links, commands, specs, examples, outputs, field names."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from scripts import load_script

from flowgrpo_ray import cli
from flowgrpo_ray.algorithm.objectives import Tie
from flowgrpo_ray.cli import commands
from flowgrpo_ray.cluster.run import _summary
from flowgrpo_ray.common.errors import PromptError, SpecError
from flowgrpo_ray.common.types import MicrobatchStats, StepStats, WeightsTicket
from flowgrpo_ray.estimate.preflight import check_run
from flowgrpo_ray.rewards import build
from flowgrpo_ray.run.checkpoint import Progress
from flowgrpo_ray.run.metrics import Scores, Signal, UnitResult, eval_row, train_row
from flowgrpo_ray.run.watch import Reading
from flowgrpo_ray.spec.file import RECIPES, load_spec, recipe_names
from flowgrpo_ray.spec.plan import plan_iteration
from flowgrpo_ray.spec.prompt_files import Prompt, load_prompts
from flowgrpo_ray.spec.sources import with_sources

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "notebooks/*.md", "flowgrpo_ray/*/assets/*/README.md")
    for page in ROOT.glob(pattern)
)
COMMANDS: Any = typer.main.get_command(cli.app)


@dataclass(frozen=True)
class Block:
    """A fenced block: ```` ```language note ````."""

    page: Path
    language: str
    note: str
    text: str

    @property
    def name(self) -> str:
        """The file name that the note ends with."""
        return self.note.split()[-1]


def blocks_of(page: Path) -> Iterator[Block]:
    fences = re.finditer(r"^```([a-z]+) ?(.*)\n((?:.*\n)*?)```$", page.read_text("utf-8"), re.M)
    for language, note, text in (fence.groups() for fence in fences):
        yield Block(page, language, note, text)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SPECS = [b for b in BLOCKS if b.language == "yaml" and b.note.startswith("spec ")]
PARTS = [b for b in BLOCKS if b.language == "yaml" and b.note.startswith("part")]
MODULES = {b.name: b for b in BLOCKS if b.language == "python" and b.note.endswith(".py")}


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- links


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_files_and_headings_that_exist(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_linked_from_another():
    text = {page: page.read_text("utf-8") for page in PAGES}
    for page in PAGES:
        if page.parent != ROOT:
            assert any(page.name in text[other] for other in PAGES if other != page), relative(page)


# --- commands


def commands_of(page: Path) -> Iterator[list[str]]:
    """Every ``flowgrpo-ray`` command line of a page: in blocks, and inline where it has a verb."""
    for block in blocks_of(page):
        if block.language in ("bash", "console"):
            lines = block.text.replace("\\\n", " ").splitlines()
            for line in lines:
                if block.language == "bash" or line.startswith("$ "):
                    yield from _command(line.removeprefix("$ "))
    for line in re.findall(r"`([^`]*flowgrpo-ray[^`]*)`", prose_of(page)):
        yield from _command(" ".join(line.split()))


def _command(line: str) -> Iterator[list[str]]:
    words = shlex.split(line, comments=True)
    for i, word in enumerate(words):
        if Path(word).name == "flowgrpo-ray" and i + 1 < len(words):
            rest = words[i + 1 :]
            stop = next((k for k, w in enumerate(rest) if w in (">", "|", "&&", ";")), len(rest))
            yield rest[:stop]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_are_real(page: Path):
    for name, *arguments in commands_of(page):
        assert name in COMMANDS.commands, f"flowgrpo-ray {name}"
        if not arguments:
            continue
        with COMMANDS.commands[name].make_context(name, list(arguments)) as context:
            overrides = context.params.get("overrides") or []
            source = context.params.get("spec")
        if source in {path.stem for path in RECIPES.glob("*.yaml")} and "..." not in str(overrides):
            load_spec(source, overrides)


def test_there_are_commands_to_check():
    found = {command[0] for page in PAGES for command in commands_of(page)}
    assert found == COMMANDS.commands.keys(), "every command is shown somewhere"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_make_targets_are_real(page: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    lines = [line for b in blocks_of(page) if b.language == "bash" for line in b.text.splitlines()]
    inline = re.findall(r"`(make [^`]+)`", prose_of(page))
    for line in [*lines, *inline]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            goals = [word for word in words[1:] if "=" not in word]
            assert set(goals) <= targets, line


# --- specs, examples, outputs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every spec and module of the docs, and the prompt files that specs name."""
    for block in [*SPECS, *MODULES.values()]:
        (tmp_path / block.name).write_text(block.text, encoding="utf-8")
    prompts = "".join(f'a sign that says "{number}"\n' for number in range(64))
    (tmp_path / "prompts").mkdir()
    for name in ("train.txt", "heldout.txt", "prompts/ocr-train.txt", "prompts/ocr-test.txt"):
        (tmp_path / name).write_text(prompts, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    return tmp_path


@pytest.mark.parametrize("block", SPECS, ids=lambda b: f"{relative(b.page)}-{b.name}")
def test_specs_are_valid_and_can_be_planned(block: Block, folder: Path):
    check_run(load_spec(block.name))


def test_pictures_of_a_parquet_file_become_files_that_prompts_name(folder: Path):
    import pyarrow
    import pyarrow.parquet

    sign = ROOT / "flowgrpo_ray/tiny/assets/prompts/tiny-edit/red-298.png"
    cell = {"bytes": sign.read_bytes(), "path": "a.png"}
    rows = [{"instruction": text, "source_image": cell, "id": 1} for text in ("a", "b")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "set.parquet")
    subprocess.run([sys.executable, "unpack.py", "set.parquet", "edits"], check=True)
    file = str(folder / "edits" / "edits.jsonl")
    prompts = with_sources(load_prompts(file, "P"), file, "P", range(1, 2), "a family")
    assert [prompt.text for prompt in prompts] == ["a", "b"]
    digest = hashlib.sha256(sign.read_bytes()).hexdigest()
    assert [prompt.images[0].digest for prompt in prompts] == [digest] * 2


def test_the_readme_has_a_spec():
    assert any(block.page.name == "README.md" for block in SPECS)


@pytest.mark.parametrize("block", PARTS, ids=lambda b: relative(b.page))
def test_pieces_of_specs_are_valid(block: Block, folder: Path):
    """In place of the same sections of the recipe."""
    sections: dict[str, Any] = yaml.safe_load(block.text)
    overrides = [f"{key}={yaml.safe_dump(value)}" for key, value in sections.items()]
    named = set(block.note.split()) & set(recipe_names())
    check_run(load_spec(named.pop() if named else "tiny-ocr", overrides))


def test_the_reward_of_the_docs_scores(folder: Path):
    """Class, options, metadata, prompt check: through the spec, as a replica builds it."""
    (part,) = [block for block in PARTS if "my_rewards.py" in block.note]
    rewards = yaml.safe_dump(yaml.safe_load(part.text)["rewards"])
    spec = load_spec("tiny-ocr", [f"rewards={rewards}"])
    own = spec.rewards["bright"]
    assert own.reward == "my_rewards:Brightness"
    reward = build(own.reward, own.options)
    images = np.zeros((3, 4, 6, 3), np.uint8)
    images[1:] = 153  # 0.6 of 255
    images.flags.writeable = False
    scores = reward(images, ["a"] * 3, [{}, {}, {"level": 0.1}])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0.4, 1.0, 0.5], atol=1e-6)
    with pytest.raises(SpecError, match=r"option level: .*less than or equal to 1, not 2"):
        build(own.reward, {"level": 2})
    with pytest.raises(SpecError, match="did you mean 'level'"):
        build(own.reward, {"levl": 0.5})
    (folder / "bad.jsonl").write_text('{"prompt": "a sign \\"1\\"", "level": 3}\n', "utf-8")
    wrong = [f"rewards={{bright: {{reward: '{own.reward}'}}}}", "prompts.evaluate=bad.jsonl"]
    with pytest.raises(PromptError, match=r"rewards\.bright: level is 3"):
        check_run(load_spec("tiny-ocr", wrong))


def test_the_tracker_of_the_docs_is_told(folder: Path):
    from flowgrpo_ray.run import trackers
    from flowgrpo_ray.run.tracking import RunRecorder

    (part,) = [b for b in PARTS if "my_trackers:Lines" in b.text]
    own = yaml.safe_dump({"tensorboard": False, **yaml.safe_load(part.text)["tracking"]})
    spec, notes = load_spec("tiny-ocr", [f"tracking={own}"]), []
    with RunRecorder(folder / "run", trackers.start(spec, folder, notes.append)) as recorder:
        recorder.log({"kind": "train", "iteration": 1, "loss": 0.5})
        image = np.full((1, 4, 6, 3), 9, np.uint8)
        recorder.log_samples(1, image, ["a sign"], {"ocr": np.ones(1)}, tracked=8)
    assert notes == ["rows in all-runs.jsonl"]
    rows = (folder / "all-runs.jsonl").read_text("utf-8")
    assert rows == '{"run": "tiny-ocr", "iteration": 1, "train/loss": 0.5}\n'
    assert (folder / "tiny-ocr-1-0.png").exists()


def outputs() -> Iterator[tuple[Block, str, str]]:
    """Each command of a console block with what the page shows below it."""
    for block in BLOCKS:
        if block.language == "console":
            for entry in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
                command, _, shown = entry.partition("\n")
                yield block, command, shown


@pytest.mark.parametrize(
    ("block", "command", "shown"), outputs(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_outputs_are_what_the_commands_print(
    block: Block,
    command: str,
    shown: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Of commands that take no time; the others were run by hand."""
    assert shown.strip(), f"{relative(block.page)} shows no output of {command}"
    program, *arguments = shlex.split(command)
    if program != "flowgrpo-ray" or arguments[0] not in ("plan", "recipes"):
        return
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(commands.console, "width", 80)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with contextlib.suppress(SystemExit):
        cli.main()
    printed = capsys.readouterr()
    assert (printed.out + printed.err).split() == shown.split()


def test_the_objective_of_the_docs_trains(folder: Path):
    """Found beside its spec, its options checked, its penalty what the page says."""
    import torch

    from flowgrpo_ray.algorithm.objectives import Noised

    (part,) = [b for b in PARTS if "my_objectives:Hinge" in b.text]
    objective = yaml.safe_dump(yaml.safe_load(part.text)["objective"])
    own = [f"objective={objective}"]
    spec = load_spec("tiny-ocr-nft", own)
    assert spec.points == 2
    assert spec.objective.penalties == {"reference_distance": 1e-4, "norm_excess": 0.05}
    assert "norm_excess" in str(spec.objective.card())
    x = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0))
    fields = dict.fromkeys(("clean", "noise", "x", "old", "reference"), x)
    grown = x * torch.tensor([1, 1, 1, 1, 0.5, 0.5, 2, 3]).view(-1, 1, 1)
    point = Noised(sigma=torch.full((8, 1, 1), 0.5), velocity=grown, anchor=None, **fields)
    excess = spec.objective.terms(point, torch.ones(8)).statistics["norm_excess"]
    norm = x.flatten(1).norm(dim=1)
    expected = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2]) * norm
    torch.testing.assert_close(excess, expected**2 / 6)
    with pytest.raises(SpecError, match=r"no option 'hing', did you mean 'hinge'"):
        load_spec("tiny-ocr-nft", [*own, "objective.hing=1"])


# --- from the authors' scripts

# Of base.py, and what grpo.py adds for images.
THERE = """
activation_checkpointing allow_tf32 dataset debug eval_freq fsdp_optimizer_offload logdir
mixed_precision num_checkpoint_limit num_epochs per_prompt_stat_tracking pretrained.model
pretrained.revision prompt_fn prompt_fn_kwargs resolution resume_from reward_fn run_name
sample.eval_guidance_scale sample.eval_num_steps sample.global_std sample.guidance_scale
sample.kl_reward sample.mini_num_image_per_prompt sample.noise_level sample.num_batches_per_epoch
sample.num_image_per_prompt sample.num_steps sample.same_latent sample.sde_type
sample.sde_window_range sample.sde_window_size sample.test_batch_size sample.train_batch_size
save_dir save_freq seed train.adam_beta1 train.adam_beta2 train.adam_epsilon
train.adam_weight_decay train.adv_clip_max train.batch_size train.beta train.cfg train.clip_range
train.clip_range_gt train.clip_range_lt train.ema train.gradient_accumulation_steps
train.learning_rate train.lora_path train.max_grad_norm train.num_inner_epochs train.sft
train.timestep_fraction train.timestep_shift train.use_8bit_adam use_lora
"""


def test_keys_of_the_authors_scripts_lead_to_keys_of_the_spec():
    text = (ROOT / "docs" / "from-flow-grpo.md").read_text("utf-8")
    rows = [row.split("|")[1:-1] for row in re.findall(r"^\|.*", text, re.M)]
    assert {name for row in rows if len(row) == 3 for name in code(row[0])} == set(THERE.split())
    recipes = {name for row in rows if len(row) == 2 for name in code(row[1])}
    assert recipes
    assert recipes <= set(recipe_names())
    known, section = set[str](), ""
    for line in load_script(GENERATOR).render().splitlines():
        if heading := re.fullmatch(r"### `(.*)`", line):
            section = f"{heading[1]}."
        elif row := re.match(r"\| `(\w+)` \|", line):
            known.add(section + row[1])
    told = [name for row in rows if len(row) == 3 for name in code(row[1])]
    # In the last column names with a dot are keys of ours too.
    told += [name for row in rows if len(row) == 3 for name in code(row[2]) if "." in name]
    endings = {".txt", ".jsonl"}
    assert not set(told) - known - endings
    assert len(told) > 50


# --- what is generated or listed


GENERATOR = ROOT / "docs" / "generate_spec_reference.py"


def test_generated_tables_are_fresh():
    for path, page, fresh in load_script(GENERATOR).pages():
        assert page == fresh, f"{path.name}: run python docs/generate_spec_reference.py"


@pytest.mark.parametrize(
    ("name", "file", "shown", "wrong"),
    [
        ("PAGE", "spec.md", "| `seed` |", "| `sead` |"),
        ("CATALOGUE", "reward-catalogue.md", "| `threads` | integer ≥ 1 |", "| `threads` | text |"),
    ],
)
def test_stale_tables_are_found(
    name: str, file: str, shown: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    generator = load_script(GENERATOR)
    stale = tmp_path / file
    page = (ROOT / "docs" / file).read_text("utf-8")
    assert shown in page
    stale.write_text(page.replace(shown, wrong), encoding="utf-8")
    monkeypatch.setattr(generator, name, stale)
    monkeypatch.setattr("sys.argv", ["generate", "--check"])
    with pytest.raises(SystemExit, match="stale"):
        generator.main()
    monkeypatch.setattr("sys.argv", ["generate"])
    generator.main()
    assert stale.read_text("utf-8") == page


def documented(page: str, heading: str) -> set[str]:
    """The names in code in the tables of one section of a page."""
    text = (ROOT / "docs" / page).read_text("utf-8").partition(f"## {heading}\n")[2]
    rows = re.findall(r"^\|.*$", text.partition("\n## ")[0], re.M)
    return {name for row in rows for cell in row.split("|")[1:-2] for name in code(cell)}


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def flat(row: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """``rewards.NAME.mean`` of ``{"rewards": {"ocr": {"mean": 1}}}``."""
    for key, value in row.items():
        name = f"{prefix}{'NAME' if prefix in ('rewards.', 'unscored.') else key}"
        if isinstance(value, dict):
            yield from flat(value, f"{name}.")
        else:
            yield name


def fields_of_a_row(recipe: str, *overrides: str) -> set[str]:
    spec = load_spec(recipe, overrides)
    plan = plan_iteration(spec, 1, 256, (1.0,) * (spec.sampling.steps + 1))
    results = [
        UnitResult(unit, Scores(dict.fromkeys(spec.rewards, ones), ones), Signal(ones, ones > 0))
        for unit, ones in ((unit, np.ones(unit.batch, np.float32)) for unit in plan.units)
    ]
    per_point = np.zeros(len(plan.points))
    stats = MicrobatchStats(1, per_point, per_point, 0, True, 0, {}, 0)
    step = StepStats(grad_norm=1.0, learning_rate=1e-4, seconds=1)
    row = train_row(spec, plan, *[WeightsTicket(1, "00")] * 2, results, [([stats], step)])
    return set(flat(row)) - {"kind"}


def fields_of_an_evaluation() -> set[str]:
    spec, two = load_spec("tiny-ocr"), np.ones(2, np.float32)
    prompts = [Prompt("red", {}, "SET")] * 2
    row = eval_row(spec, 1, [Scores(dict.fromkeys(spec.rewards, two), two)], prompts)
    row["sets"]["SET"] = {"NAME": row["sets"]["SET"].popitem()[1]}
    row["per_prompt"]["rewards"] = {"NAME": row["per_prompt"]["rewards"].popitem()[1]}
    reading = Reading(1, 1, 1, 1, 1, 1, 1, 1, diverging=False)
    row["watch"] = {"NAME": reading.as_json()}
    return set(flat(row)) - {"kind"}


def test_every_field_of_a_metrics_row_is_documented():
    """Of every objective that reports something of its own."""
    fields = fields_of_a_row("tiny-ocr", "model.dtype=float16")
    fields |= fields_of_a_row("tiny-ocr-nft") | fields_of_a_row("tiny-ocr-awm")
    fields |= set(flat({"tie": Tie.of(1.0).row(1.0)}))
    assert fields <= documented("runs.md", "metrics.jsonl")
    evaluation = fields_of_an_evaluation()
    assert evaluation <= documented("runs.md", "metrics.jsonl")
    assert documented("runs.md", "metrics.jsonl") == fields | evaluation


def test_every_field_of_the_summary_is_documented():
    summary = _summary(load_spec("tiny-ocr"), Progress(1, 1, 1.0, 0, "", ""), floors={})
    assert summary.keys() == documented("runs.md", "summary.json")


def test_every_reward_and_option_of_a_served_reward_is_documented():
    from flowgrpo_ray.rewards import BUILTIN, resolve
    from flowgrpo_ray.serving.args import RewardServiceArgs

    text = (ROOT / "docs" / "reward-catalogue.md").read_text("utf-8")
    assert all(f"**`{name}`**" in text for name in BUILTIN)
    tables = [name for _, name, _ in load_script(GENERATOR).OPTIONS.findall(text)]
    with_options = [name for name in BUILTIN if inspect.signature(resolve(name)).parameters]
    assert sorted(tables) == sorted([*with_options, "launch"])
    shown = documented("serving.md", "Arguments of a deployment")
    assert RewardServiceArgs.model_fields.keys() <= shown


def test_the_map_of_the_code_is_that_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    package = ROOT / "flowgrpo_ray"
    wings = {path.parent.name for path in package.glob("*/__init__.py")}
    told = dict(re.findall(r"^- \*\*(\w+)\*\* ((?:.+\n(?!- |\n))*.+)", text, re.M))
    assert told.keys() == wings
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    names = {name.rpartition("/")[2] for name in files}
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert name in files or (name in names and "/" not in name) or (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "generator",
    ["spec_reference", pytest.param("family_table", marks=pytest.mark.slow)],
)
def test_the_generators_run_as_programs(generator: str):
    run = subprocess.run(
        [sys.executable, ROOT / "docs" / f"generate_{generator}.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
