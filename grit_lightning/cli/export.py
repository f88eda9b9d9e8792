"""`grit export`: a trained adapter at its effective ranks, or the model with it merged in."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from grit_lightning.export.adapter import export_adapter


def export_command(words: Sequence[str]) -> None:
    """Run `grit export` with these command-line words."""
    parser = argparse.ArgumentParser("grit export", allow_abbrev=False)
    parser.description = "Write a trained adapter at its effective ranks, for plain PEFT and transformers to load."
    parser.add_argument("--ckpt_path", required=True, help="Checkpoint of the run.")
    parser.add_argument("--output", required=True, help="Folder to make; an existing one must be empty.")
    parser.add_argument("--merge", action="store_true", help="Write the full model with the adapter merged in.")
    parser.add_argument("--keep_empty", action="store_true", help="Keep layers that learnt nothing, at rank 1.")
    given = parser.parse_args(words)
    adapter = export_adapter(given.ckpt_path, given.output, given.merge, given.keep_empty)
    what = "merged model" if given.merge else "adapter"
    saved = 1 - adapter.parameters / adapter.parameters_before
    size = f"{adapter.parameters_before:,} → {adapter.parameters:,} parameters ({saved:.1%} fewer)"
    shape = f"{len(adapter.ranks)} layers at mean rank {adapter.mean_rank:.2f}, {size}"
    if adapter.whole:
        shape = f"{adapter.parameters:,} parameters, whole and not cut to effective ranks: {adapter.whole}"
    Console().print(f"{given.output}: {what}, {shape}", soft_wrap=True)
