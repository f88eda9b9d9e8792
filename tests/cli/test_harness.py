"""`grit eval-harness` on local tasks: the harness measures the trained model, as checkpoint and as exported adapter."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from grit_lightning.cli import eval_harness as harness
from grit_lightning.cli.program import main

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'grit-lightning[harness]'"
)
COPIED = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # `trained` is a copy
PROMPT, CHOICES = "It is {n}. Even?", (" no", " yes", " maybe so")
COUNT = 12


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks over one small table: choose an answer, or write it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"n": n, "label": n * n % 3} for n in range(COUNT)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": PROMPT.format(n="{{n}}"),
    }
    choose = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "label",
    }
    write = {"task": "write", "output_type": "generate_until", "doc_to_target": "{{label}}"}
    choose["target_delimiter"] = ""
    choose["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    write["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    write["generation_kwargs"] = {"until": ["!"], "max_gen_toks": 4, "do_sample": False}
    for task in (choose, write):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@torch.no_grad()
def accuracy_by_hand(checkpoint: str) -> float:
    """Share of rows whose right choice has the highest log-likelihood, one unpadded row at a time."""
    model, tokenizer = harness.load_trained(checkpoint)
    right = 0
    for n in range(COUNT):
        prompt = tokenizer(PROMPT.format(n=n)).input_ids
        scores = []
        for choice in CHOICES:
            answer = tokenizer(choice).input_ids
            log_probabilities = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_probabilities[len(prompt) - 1 + i, t]) for i, t in enumerate(answer)))
        right += scores.index(max(scores)) == n * n % 3
    return right / COUNT


@needs_harness
@COPIED
@pytest.mark.usefixtures("trained")
def test_checkpoint_and_exported_adapter_are_measured_alike_and_as_by_hand(
    tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = "a/checkpoints/last.ckpt"
    words = ["--tasks", "choose", "write", f"--include_path={tasks}", "--batch_size=5", "--device=cpu"]
    main(["eval-harness", f"--ckpt_path={checkpoint}", *words])
    table = capsys.readouterr().out
    assert "|choose|" in table
    assert "exact_match" in table
    main(["export", f"--ckpt_path={checkpoint}", "--output=adapter"])
    main(["eval-harness", "--adapter=adapter", *words, "--output=elsewhere"])
    found = [json.loads((Path(folder) / "harness-choose+write.json").read_text()) for folder in ("a", "elsewhere")]
    assert found[0]["results"] == found[1]["results"]
    assert found[0]["results"]["choose"]["acc,none"] == pytest.approx(accuracy_by_hand(checkpoint))
    assert found[0]["n-samples"]["write"] == {"original": COUNT, "effective": COUNT}


@needs_harness
@COPIED
@pytest.mark.usefixtures("trained")
def test_a_limit_and_an_unknown_task(
    tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval-harness", "--ckpt_path=a/checkpoints/last.ckpt", f"--include_path={tasks}", "--device=cpu"]
    main([*words, "--tasks", "ch*", "--limit=3"])
    results = json.loads(Path("a/harness-ch_.json").read_text())
    assert results["n-samples"]["choose"]["effective"] == 3

    from lm_eval import tasks as shipped

    class OwnTasks(shipped.TaskManager):  # the thousands that are shipped take a minute to read
        def __init__(self, include_path: str, include_defaults: bool) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(shipped, "TaskManager", OwnTasks)
    with pytest.raises(SystemExit):
        main([*words, "--tasks", "chose"])
    assert "--tasks: expected tasks that lm-evaluation-harness knows, got chose." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--adapter=nowhere"],
            "--adapter: expected a folder with adapter_config.json, as `grit export` writes it, got nowhere,",
        ),
        (["--ckpt_path=nowhere.ckpt"], "--ckpt_path: expected a checkpoint, got nowhere.ckpt, which does not exist"),
    ],
)
def test_what_is_not_there_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "_require_harness", lambda: None)
    with pytest.raises(SystemExit):
        main(["eval-harness", *words, "--tasks", "any"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_without_lm_eval_the_error_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "lm_eval" else original(name))
    with pytest.raises(SystemExit):
        main(["eval-harness", "--adapter=any", "--tasks", "any"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'grit-lightning[harness]'" in line
