"""Scores the outputs of a run again with the packages that define the metrics, and compares with what the run recorded.

    python benchmarks/check_generations.py runs/mine/generations-test.jsonl

ROUGE comes from rouge_score and GSM8K's exact match from the code of openai/grade-school-math, row by row; BLEU comes from
sacrebleu and is compared with summary.json beside the file. Needs `pip install rouge-score`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

ROUGE = ("rouge1", "rouge2", "rougeL")
FINAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def final_answer(text: str) -> str:
    """Return the final answer of a solution, as openai/grade-school-math extracts it."""
    match = FINAL_ANSWER.search(text)
    return match.group(1).strip().replace(",", "") if match else "[invalid]"


def differences(file: Path) -> dict[str, float]:
    """Return the largest difference between recorded and recomputed scores, by the name of the score.

    Args:
        file: generations-….jsonl of a run.
    """
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    found: dict[str, float] = {}

    def compare(name: str, recorded: float, recomputed: float) -> None:
        found[name] = max(found.get(name, 0.0), abs(recorded - recomputed))

    for record in records:
        output, reference = record["output"], record["reference"]
        if "rouge1" in record:
            for name, score in scorer.score(target=reference, prediction=output).items():
                compare(name, record[name], score.fmeasure)
        if "exact_match" in record:
            compare("exact_match", record["exact_match"], final_answer(output) == final_answer(reference))
    bleu = _recorded_bleu(file)
    if bleu is not None:
        outputs, references = ([record[key] for record in records] for key in ("output", "reference"))
        compare("bleu", bleu, sacrebleu.corpus_bleu(outputs, [references]).score / 100)
    return found


def _recorded_bleu(file: Path) -> float | None:
    summary = file.with_name("summary.json")
    if not summary.is_file():
        return None
    metrics: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))["metrics"]
    stage = file.stem.removeprefix("generations-")
    return next(
        (metrics[when][f"{stage}/bleu"] for when in ("after", "before") if f"{stage}/bleu" in metrics[when]), None
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for name, difference in differences(parser.parse_args().file).items():
        print(f"{name:12} largest difference {difference:.1e}")
