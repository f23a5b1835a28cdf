"""README and docs/ are true: commands parse, flags and defaults agree, named files exist."""

import doctest
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import attend
import curves
import evaluate
import export
import predict
import probe
import reproduce
from benchmarks import survey, throughput
from flags import build_parser, parse_flags
from models import zoo
from models.configs import CONFIGS
from tests.helpers import ROOT, random_model, save_bin, write_image
from tests.test_modeling import COUNTS

PAGES = {path: path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"))}
COMMANDS = (attend, curves, evaluate, export, predict, probe)
PARSE = {f"{command.__name__}.py": command.build_parser().parse_args for command in COMMANDS}
PARSE["train.py"] = lambda argv: parse_flags(argv, world_size=8)
PARSE["reproduce.py"] = lambda argv: reproduce.build_parser().parse_known_args(argv)
PARSE["models.zoo"] = lambda argv: not zoo.main(argv) or pytest.fail(str(argv))
PARSE |= {"benchmarks/survey.py": survey.parse, "benchmarks/throughput.py": throughput.parse}
PORT_DEFAULTS = (  # the earlier port's flags
    "--dataset cifar10 --pretrained_dir checkpoint/ViT-B_16.npz --output_dir output --img_size 224 "
    "--train_batch_size 512 --eval_every 100 --learning_rate 0.03 --seed 42 "
    "--weight_decay 0 --num_steps 10000 --decay_type cosine --warmup_steps 500 --max_grad_norm 1 "
    "--local_rank -1 --gradient_accumulation_steps 1 --fp16_opt_level O2 --loss_scale 0"
)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(program of PARSE, its arguments) of every command among the shell lines `text`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word in PARSE:
                end = next((j for j in range(i, len(words)) if words[j] in ("|", "&&")), None)
                found.append((word, words[i + 1 : end]))
    return found


@pytest.mark.parametrize("program", PARSE)
def test_every_command_parses(program, tmp_path, monkeypatch):
    """Those of fenced and indented blocks, of backquoted text, and of `make demo`."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    fenced, quoted = r"^```bash\n((?:.*\n)*?)```", r"`(python3 [^`\n]+)`"
    kinds = (fenced, quoted, r"^    (python3? .*\n(?:      .*\n)*)")
    text = "\n".join(PAGES.values())
    blocks = [block for kind in kinds for block in re.findall(kind, text, flags=re.M)]
    demo = subprocess.run(["make", "-n", "-C", ROOT, "demo"], capture_output=True, text=True).stdout
    found = commands("\n".join([*blocks, demo]))
    shown = [argv for name, argv in found if name == program and "--help" not in argv]
    assert shown and "--name demo" in demo
    for argv in shown:
        PARSE[program](argv)


@pytest.mark.parametrize("action", build_parser()._actions[1:], ids=lambda action: action.dest)
def test_every_flag_is_documented_with_its_default(action):
    row = rf"^\| `{re.escape(action.option_strings[0])}`[^|]*\| (.+?) \|"
    [default] = re.findall(row, PAGES[ROOT / "docs/training.md"], flags=re.M)
    if isinstance(action.default, float):
        assert float(default) == action.default
    elif action.default in (None, False):
        own = ("the file's own", "the variant's own", "off", "64, or 512 on a CUDA GPU")
        assert default in (("required",) if action.required else own)
    else:
        assert default == str(action.default)


def test_the_specified_defaults():
    stated, own = ["--name", "x", *PORT_DEFAULTS.split()], ["--name", "x"]
    assert build_parser().parse_args(stated) == build_parser().parse_args(own)


def test_the_models_table_is_true():
    table = PAGES[ROOT / "docs/weights.md"]
    rows = re.findall(r"^\| (\S+) \| .*? \| (\d+,\d+,\d+) \|", table, flags=re.M)
    assert len(rows) == len({id(row) for row in CONFIGS.values()})
    assert all(COUNTS[name] == int(count.replace(",", "")) for name, count in rows)


def test_the_readme_is_short_and_contributing_names_every_file():
    assert len(PAGES[ROOT / "README.md"].split()) <= 1500
    files = PAGES[ROOT / "CONTRIBUTING.md"]
    tree = re.search(r"## Files\n+```text\n(.*?)```", files, flags=re.S)[1]
    named, folder = set(), ""
    for indent, name in re.findall(r"^( *)(\S+)", tree, flags=re.M):
        folder = folder if indent else name
        named.add(folder + name if indent else name)
    files = [path for pattern in ("*.*", "models/*", "utils/*") for path in ROOT.glob(pattern)]
    product = {str(p.relative_to(ROOT)) for p in files if p.suffix in (".py", ".csv", ".ipynb")}
    assert product <= named | {"models/__init__.py", "utils/__init__.py"}
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", PAGES[page]):
        path = page.parent / target if target else page
        assert path.exists(), target
        titles = re.findall(r"^#+ (.*)", PAGES.get(path.resolve(), ""), flags=re.M)
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not heading or heading in slugs, heading


def python_of(page, word):
    """The block of Python code with `word` on a page."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[ROOT / page], flags=re.M | re.S)
    [block] = [block for block in blocks if word in block]
    return block


def test_predictions_in_python_are_those_that_the_pages_show(workdir, capsys):
    """A model that gives the class shares of the README's table to every image."""
    shown = re.search(r"0000.jpg: horse (\S+)  dog (\S+)", PAGES[ROOT / "README.md"]).groups()
    horse, dog = map(float, shown)
    model = random_model(classes=3)
    torch.nn.init.constant_(model.head.weight, 1e-9)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([1 - horse - dog, dog, horse]).log())
    Path("output").mkdir()
    save_bin("output/pets_checkpoint.bin", model, ("cat", "dog", "horse"))
    for name in ("pets/val/horse/0000.jpg", "a.jpg", "photos/b.jpg"):
        write_image(workdir / name)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    lines = parser.get_doctest(python_of("README.md", "Classifier"), {}, "README.md", None, 0)
    assert len(lines.examples) == 3 and lines.examples[-1].want
    runner.run(lines)
    assert runner.summarize() == (0, 3), capsys.readouterr().out
    capsys.readouterr()
    exec(python_of("docs/weights.md", "Classifier"), found := {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("(('horse', 0.637") and first.count("'") == 6
    assert second.startswith("photos/b.jpg ('horse', 0.637")
    assert found["path"] == "a.jpg" and found["features"].shape == (32,)
