"""What docs/index.md shows is what happens, from a file to an adapter that answers in plain PEFT."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from grit_lightning.cli.program import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "index.md").read_text(encoding="utf-8")
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def backbone(tiny_backbone_dir: Path, tmp_path: Path) -> Path:
    """A tiny model that chats, and the page's file beside it, with enough rows to divide."""
    folder = Path(shutil.copytree(tiny_backbone_dir, tmp_path / "backbone"))
    for file, setting in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps(content | {setting: 512}), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    Path("mine.jsonl").write_text(blocks("json")[0] * 20, encoding="utf-8")
    return folder


def run(block: str, backbone: Path) -> None:
    code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(backbone))
    exec(compile(code, "docs/index.md", "exec"), {})


def test_the_commands_make_an_adapter_that_plain_peft_loads(
    backbone: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    install, *commands = (shlex.split(line, comments=True) for line in blocks("bash")[0].splitlines())
    assert install == ["pip", "install", "."]
    assert [words[:2] for words in commands] == [["grit", name] for name in ("fit", "test", "export")]
    fit, test, export = (words[1:] for words in commands)
    small = [word for word in tiny if not word.startswith(("--data", "--model.backbone"))]
    main([*fit, *small, f"--model.backbone={backbone}", "--trainer.max_steps=2", "--model.generation=null"])
    main(test)
    main(export)
    capsys.readouterr()
    run(blocks("python")[0], backbone)
    assert capsys.readouterr().out


def test_the_script_makes_an_adapter(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.__init__

    def briefly(self: Trainer, **settings: object) -> None:
        original(self, **{**settings, "fast_dev_run": 2, "accelerator": "cpu"})  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "__init__", briefly)
    run(blocks("python")[1], backbone)
    assert Path("mine-adapter", "adapter_model.safetensors").is_file()
