"""`grit export`: a trained adapter at its effective ranks, or the model with it merged in."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from grit_lightning.cli.plain_parser import PlainParser
from grit_lightning.cli.run_words import named_checkpoint


def export_command(words: Sequence[str]) -> None:
    """Run `grit export` with these command-line words."""
    parser = PlainParser(
        "grit export", "Write a trained adapter at its effective ranks, for plain PEFT and transformers to load."
    )
    parser.add_argument(
        "--ckpt_path", required=True, help="Checkpoint of the run; `last` for that of the run in --config."
    )
    parser.add_argument("--config", action="append", default=[], help="Configuration of the run, for --ckpt_path last.")
    parser.add_argument("--output", required=True, help="Folder to make; an existing one must be empty.")
    parser.add_argument("--merge", action="store_true", help="Write the full model with the adapter merged in.")
    parser.add_argument("--keep_empty", action="store_true", help="Keep layers that learnt nothing, at rank 1.")
    given = parser.parse_args(words)
    checkpoint = named_checkpoint(given.ckpt_path, given.config)

    from grit_lightning.export.adapter import export_adapter  # imports torch, which the errors above can do without

    adapter = export_adapter(checkpoint, given.output, given.merge, given.keep_empty)
    what = "merged model" if given.merge else "adapter"
    saved = 1 - adapter.parameters / adapter.parameters_before
    size = f"{adapter.parameters_before:,} → {adapter.parameters:,} parameters ({saved:.1%} fewer)"
    shape = f"{len(adapter.ranks)} layers at mean rank {adapter.mean_rank:.2f}, {size}"
    if adapter.whole:
        shape = f"{adapter.parameters:,} parameters, whole and not cut to effective ranks: {adapter.whole}"
    Console().print(f"{given.output}: {what}, {shape}", soft_wrap=True)
