"""`grit retain`: from a plain PEFT adapter to one that plain PEFT loads; what it shows, and what it refuses to do."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grit_lightning.cli.program import main
from grit_lightning.cli.retain import _is_on, _self_written, _write
from grit_lightning.cli.retain_text import Doing, console_for, print_front, verdict
from grit_lightning.cli.retain_words import backbone_words, output_folder
from grit_lightning.editing import Change, FrontPoint
from grit_lightning.forgetting import GeneralText

Run = Callable[..., str]


def sentences(count: int, first: int, words: str) -> list[str]:
    return [f"{n:03}: {words[n % len(words) :]}{words[: n % len(words)]} {n}." for n in range(first, first + count)]


def train(model: Any, rows: list[list[int]], steps: int, lr: float) -> None:
    """A plain loop, without anything of this package."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        chosen = [rows[(4 * step + i) % len(rows)] for i in range(4)]
        length = min(map(len, chosen))
        ids = torch.tensor([row[:length] for row in chosen])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_dir: Path) -> Path:
    """`backbone`, which has learnt general text; `adapter`, which has learnt the task; `wiki.jsonl` and `mine.jsonl`."""
    folder = tmp_path_factory.mktemp("retain")
    general, task = sentences(60, 0, "what a tiny model knows "), sentences(60, 100, "THE TASK ")
    (folder / "wiki.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in general))
    rows = [{"prompt": text[:4], "completion": text[4:]} for text in task]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_backbone_dir)
    model = LlamaForCausalLM.from_pretrained(tiny_backbone_dir)
    train(model, [tokenizer(text).input_ids for text in general], 40, 1e-2)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    backbone = LlamaForCausalLM.from_pretrained(folder / "backbone")
    adapted = get_peft_model(
        backbone, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    train(adapted, [tokenizer(text).input_ids for text in task], 30, 1e-2)
    adapted.save_pretrained(str(folder / "adapter"))
    return folder


@pytest.fixture
def words(home: Path) -> list[str]:
    return [
        f"--adapter={home / 'adapter'}",
        "--config=instruct",
        f"--data.source={home / 'mine.jsonl'}",
        "--data.holdout=0.3",
        "--model.dtype=float32",
        f"--general={home / 'wiki.jsonl'}",
        "--block_size=32",
        "--calibration_blocks=16",
        "--held_out_blocks=8",
        "--calibration_rows=16",
        "--held_out_rows=8",
        "--output=out",
    ]


@pytest.fixture
def retain(words: list[str], capsys: pytest.CaptureFixture[str]) -> Run:
    """What `grit retain` prints; the words that are given replace those of the same option."""

    def run(*given: str) -> str:
        named = {word.partition("=")[0] for word in given} - {"--general"}
        main(["retain", *[word for word in words if word.partition("=")[0] not in named], *given])
        return capsys.readouterr().out

    return run


def loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text).input_ids]) for text in texts]
        return float(torch.stack([model(input_ids=row, labels=row).loss for row in ids]).mean())


def test_a_plain_adapter_becomes_one_that_forgets_less_and_that_plain_peft_loads(home: Path, retain: Run) -> None:
    before = {file.name: file.read_bytes() for file in (home / "adapter").iterdir()}

    shown = retain("--task_tolerance=0.05")

    assert {path.name for path in Path("out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "front.json",
        "front.png",
    }
    assert {file.name: file.read_bytes() for file in (home / "adapter").iterdir()} == before
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "backbone")
    general = [json.loads(line)["text"] for line in (home / "wiki.jsonl").read_text().splitlines()]
    losses = []
    for folder in (home / "adapter", Path("out")):
        backbone = LlamaForCausalLM.from_pretrained(home / "backbone")
        losses.append(loss(PeftModel.from_pretrained(backbone, str(folder)), tokenizer, general))
    assert losses[1] < losses[0] - 0.01
    front = json.loads(Path("out/front.json").read_text())
    assert 0 < front["chosen"]["task"]["change"] <= 0.05
    assert front["calibration"]["task"]["rows"] == 16
    assert front["held_out"] == {"task": front["held_out"]["task"], "wiki": {"rows": 8, "tokens": 256}}
    for said in (
        "adapter as it is",
        "→ retained, μ",
        "WiSE-FT, α",
        "base model",
        "undoes",
        "PeftModel.from_pretrained(",
    ):
        assert said in shown
    assert "\x1b" not in shown


def test_a_bound_on_forgetting_is_kept_and_peers_are_measured_beside(retain: Run) -> None:
    found = json.loads(retain("--forgetting=0.02", "--compare=diagonal", "--json"))

    assert found["target"] == {"kind": "forgetting", "value": 0.02}
    assert found["chosen"]["general"]["change"] <= 0.02
    assert set(found["peers"]) == {"scaling", "diagonal"}
    assert {point["method"] for point in found["front"]} >= {"unedited", "retention", "scaling", "diagonal", "backbone"}


def test_several_texts_have_weights_and_the_base_model_writes_one(home: Path, tmp_path: Path, retain: Run) -> None:
    rows = [{"question": f"{n}?", "answer": f"{n}!"} for n in range(40)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = json.loads(retain("--general=chat.jsonl:0.5", "--general=self:2", "--mu=0.1", "--json"))

    assert found["general_weights"] == {"wiki": 1.0, "chat": 0.5, "self": 2.0}
    assert {name: size["rows"] for name, size in found["calibration"].items()} == {
        "task": 16,
        "wiki": 16,
        "chat": 16,
        "self": 16,
    }
    assert found["held_out"]["self"]["rows"] == 8
    assert found["chosen"]["mu"] == 0.1


def test_what_the_base_model_writes_to_measure_on_is_apart_from_what_it_wrote_for_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def write(*_: Any, seed: int, apart_from: Any, **options: Any) -> list[dict[str, list[int]]]:
        asked.append((seed, list(apart_from)))
        return [{"input_ids": [seed, 2], "learnt": [1, 2]}] * 3

    monkeypatch.setattr("grit_lightning.forgetting.self_written.write_general", write)
    own = SimpleNamespace(block_size=2, batch_size=4, calibration_blocks=3, held_out_blocks=5)

    rows = _self_written(own, GeneralText("self", 2.0), None, None, 7, Doing(Console()))

    assert asked == [(7, []), (8, rows.calibration)]
    assert rows.remark.endswith("3 held out and not 5, as it went on writing the same")


def test_a_run_of_ours_is_retained_from_its_last_checkpoint(
    trained: Path, home: Path, tiny_backbone_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"It is {n}.", "label": n % 2} for n in range(100, 140)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    words = ["--data.source=rows.jsonl", "--data.holdout=0.25", "--held_out_rows=4"]
    general = [f"--general={home / 'wiki.jsonl'}", "--general=self", "--block_size=32", "--held_out_blocks=4"]
    last = ["--ckpt_path=last", f"--config={trained / 'config.yaml'}"]
    main(["retain", *last, *words, *general, "--mu=0.1", "--output=out"])

    shown = capsys.readouterr().out
    for said in (
        "mean, above base",
        "self: 48 rows that the base model has written (0 conversations), 4 held out",
    ):
        assert said in shown
    backbone = LlamaForCausalLM.from_pretrained(tiny_backbone_dir)
    assert PeftModel.from_pretrained(backbone, "out").peft_config["default"].r <= 5  # the run's


def test_only_what_was_written_before_is_replaced_and_comes_back_if_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(output: str, adapter: str = "mine", overwrite: bool = True) -> Path:
        return output_folder(SimpleNamespace(output=output, adapter=adapter, overwrite=overwrite))

    for name in ("before", "more"):
        Path(name).mkdir()
        for file in ("front.json", "adapter_config.json"):
            Path(name, file).write_text("old")
    Path("more/notes.txt").touch()

    assert asked("new") == tmp_path / "new"
    assert asked("before") == tmp_path / "before"
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        asked("before", overwrite=False)
    with pytest.raises(FileExistsError, match="expected another folder than that of --adapter, got before"):
        asked("before", adapter="../" + tmp_path.name + "/before")
    with pytest.raises(FileExistsError, match="what `grit retain` has written and nothing else"):
        asked("more")

    def save(folder: Path) -> None:
        assert folder.name == "before"  # which the card says
        assert Path("before/front.json").read_text() == "old"  # even if this process is killed now
        if full:
            raise OSError("no space")
        folder.mkdir()
        (folder / "front.json").write_text("new")

    full = True
    with pytest.raises(OSError, match="no space"):
        _write(SimpleNamespace(save=save), tmp_path / "before")
    assert Path("before/front.json").read_text() == "old"
    full = False
    _write(SimpleNamespace(save=save), tmp_path / "before")
    assert {file.read_text() for file in Path("before").iterdir()} == {"new"}
    assert {path.name for path in Path().iterdir()} == {"before", "more"}


def test_the_backbone_is_the_one_that_is_given_or_else_the_one_that_the_adapter_names(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/name", "revision": "v2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))

    assert backbone_words(str(tmp_path), None) == ["--model.backbone=owner/name", "--model.revision=v2"]
    assert backbone_words(str(tmp_path), "mine") == ["--model.backbone=mine"]


def test_on_a_terminal_what_is_done_has_a_bar_and_then_a_line() -> None:
    file = io.StringIO()
    doing = Doing(Console(file=file, force_terminal=True, width=80, highlight=False))
    with doing.shown():
        doing("statistics of [wiki]", 1, 2)
        assert [task.description for task in doing._bars.tasks] == ["statistics of \\[wiki]"]
        doing("statistics of [wiki]", 2, 2)
        assert doing._bars.tasks == []
    assert "statistics of [wiki]: 2 rows, " in file.getvalue()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.1, 0.014, "μ 0.1 undoes 86% of what was forgotten (+0.1000 → +0.0140 nats per token above the base model);"),
        (0.1, -0.01, "μ 0.1 undoes all of what was forgotten"),
        (0.1, 0.12, "μ 0.1 undoes nothing of what was forgotten"),
        (-0.02, -0.03, "The adapter had forgotten nothing of this text (-0.0200 nats per token); at μ 0.1"),
    ],
)
def test_the_verdict_says_what_was_undone(before: float, after: float, said: str) -> None:
    points = [
        FrontPoint("unedited", 0.0, Change(0.7, 0.0, (0.0, 0.0)), Change(3.0, before, None), {}),
        FrontPoint("retention", 0.1, Change(0.7, 0.0003, (-0.001, 0.002)), Change(3.0, after, None), {}),
    ]
    shown = verdict(SimpleNamespace(front=points, chosen=points[1]))
    assert shown.startswith(said)
    assert shown.endswith("the task's loss changes by +0.0003 (-0.0010 … +0.0020).")


@pytest.mark.parametrize(
    ("mine", "wanted", "moved"), [("cuda:0", "cuda", False), ("cuda:0", "cuda:1", True), ("cpu", "cuda", True)]
)
def test_a_backbone_is_moved_only_where_it_is_not(mine: str, wanted: str, moved: bool) -> None:
    assert _is_on(torch.device(mine), torch.device(wanted)) is not moved


def test_the_chosen_point_is_marked_whatever_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def point(mu: float) -> FrontPoint:
        change = Change(0.7, 0.01, (-0.001, 0.002))
        return FrontPoint(
            "retention", mu, change, Change(0.7, 0.0, (0.0, 0.0)), {"wiki": change}, None, {"of": math.nan}
        )

    front = [point(0.1), point(0.2)]
    chosen = replace(front[1], predicted={"of": float("nan")})
    print_front(console_for(), SimpleNamespace(front=front, chosen=chosen), ["wiki"])
    shown = capsys.readouterr().out
    assert "  retained, μ 0.1  0.7000 +0.0100 (-0.0010 … +0.0020)" in shown
    assert "→ retained, μ 0.2" in shown


def test_what_is_wrong_with_the_machine_is_said_before_anything_is_read(
    retain: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(*args: Any) -> None:
        raise AssertionError("this takes minutes")

    monkeypatch.setattr("grit_lightning.cli.retain._task", read)
    Path("file").touch()
    for given in ("--device=gpu", "--output=file/out", "--general=a.txt:0"):
        with pytest.raises(SystemExit):
            retain("--mu=0.1", given)
        assert given.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--mu=0.1", "--forgetting=0"], "expected exactly one of --task_tolerance, --forgetting, --mu"),
        ([], "such as --task_tolerance 0.005, got none."),
        (
            ["--mu=0.1", "--ckpt_path=a"],
            "expected exactly one of --adapter, --ckpt_path, got --adapter and --ckpt_path.",
        ),
        (["--forgetting=nan"], "--forgetting: expected a finite number, got nan."),
        (["--mu=-1"], "--mu: expected a number of at least 0, got -1.0."),
        (["--mu=0.1", "--batch_size=0"], "--batch_size: expected a number of at least 1, got 0."),
        (["--mu=0.1", "--task_metric=rouge1"], "--task_metric: expected --task_tolerance"),
        (["--mu=0.1", "--general=self", "--general=self:2"], "--general self: expected it once, got it several times."),
        (["--mu=0.1", "--compare=diagnal"], "Did you mean `diagonal`?"),
        (["--mu=0.1", "--output=taken"], "--output: expected a new or an empty folder"),
        (["--mu=0.1", "--adapter=nowhere"], "--adapter: expected a folder with adapter_config.json"),
        (
            ["--mu=0.1", "--adapter=owner/name"],
            "--adapter: expected a folder, got owner/name, which does not exist. A hub id is not taken: download it first, "
            "with `hf download owner/name --local-dir DIR`, and name that folder.",
        ),
        (["--mu=0.1", "--device=gpu"], "--device: expected a device that torch can compute on here, such as cpu,"),
        (["--mu=0.1", "--device=cuda:99"], "cuda or cuda:0, got 'cuda:99'. torch says: "),
        (["--mu=0.1", "--device=meta"], "cuda or cuda:0, got 'meta'. torch says: "),
        (["--mu=0.1", "--general=a.txt:-1"], "--general a.txt:-1: expected a weight above 0"),
        (["--mu=0.1", "--output=taken/file/out"], "--output: expected a folder that can be written, got"),
        (["--mu=0.1", "--adapter=ia3"], "--adapter: expected a plain LoRA, whose B can be edited by itself, got a IA3"),
        (["--mu=0.1", "--adapter=dora"], "got a DoRA"),
        (["--mu=0.1", "--adapter=broken"], "--adapter: expected JSON in broken/adapter_config.json"),
        (["--mu=0.1", "--adapter=nameless"], "--backbone: expected the model that nameless was trained on"),
        (["--mu=0.1", "--adapter=wide"], "--backbone: expected the model that wide was trained on"),
        (["--mu=0.1", "--block_size=200"], "--block_size: expected at most the 128 tokens"),
        (
            ["--mu=0.1", "--calibration_blocks=1"],
            "general_rows of wiki: expected at least 40 tokens, got 32",
        ),
        (["--mu=0.1", "--tokenizer=large"], "expected token ids below 320, the model's vocabulary, got"),
        (["--task_tolerance=1000"], "task_tolerance: expected less than what the adapter has learnt"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence_and_nothing_is_written(
    given: list[str], said: str, home: Path, retain: Run, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Any
) -> None:
    Path("taken").mkdir()
    Path("taken/file").touch()
    settings = json.loads((home / "adapter" / "adapter_config.json").read_text())
    for name, changed in {"dora": {"use_dora": True}, "nameless": {"base_model_name_or_path": None}}.items():
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(json.dumps(settings | changed))
    Path("broken").mkdir()
    Path("broken/adapter_config.json").write_text('{"peft_type": "LO')
    if "--adapter=ia3" in given:
        ia3 = IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        get_peft_model(LlamaForCausalLM.from_pretrained(home / "backbone"), ia3).save_pretrained("ia3")
    if "--adapter=wide" in given:
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        large = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320))
        lora = get_peft_model(large, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        lora.peft_config["default"].base_model_name_or_path = str(home / "backbone")
        lora.save_pretrained("wide")
    if "--tokenizer=large" in given:
        tiny_tokenizer.add_tokens(
            [f"{letter} model" for letter in "ab"] + [f"word{n}" for n in range(400)] + [" tiny "]
        )
        tiny_tokenizer.save_pretrained("large")
    before = {path for path in Path().rglob("*") if "cache" not in path.parts}

    with pytest.raises(SystemExit):
        retain(*given)

    error = capsys.readouterr().err
    assert said in error.splitlines()[-1 if "lists the" not in error.splitlines()[-1] else -2]
    assert "Traceback" not in error
    assert {path for path in Path().rglob("*") if "cache" not in path.parts} == before


def test_the_verdict_says_what_the_bound_is_on() -> None:
    from grit_lightning.cli.retain_text import verdict
    from grit_lightning.editing import Change, FrontPoint, Target

    def point(method: str, mu: float, metric: float, forgotten: float) -> FrontPoint:
        loss, general = Change(1.0, 0.1, None), Change(2.0, forgotten, None)
        return FrontPoint(method, mu, loss, general, {}, Change(0.8, metric, None))

    chosen, target = point("retention", 0.2, -0.01, 0.05), Target("task_tolerance", 0.02)
    front = [point("unedited", 0.0, 0.0, 0.2), point("backbone", float("inf"), -0.3, 0.0), chosen]
    said = verdict(SimpleNamespace(chosen=chosen, front=front, target=target))  # type: ignore[arg-type]
    assert "undoes 75% of what was forgotten (+0.2000 → +0.0500" in said
    assert "metric, which the bound of 0.02 is on, by -0.0100" in said
