"""Run many random jobs outside pytest, and print what came of them:

python -m tests.fuzz.run --kinds llama,vit --seeds 0-9 --log outcomes.jsonl
    (from the project's folder; all kinds by default; --what damaged: checkpoints that lack
    something, against what transformers' loader reports; --what statistics: of layers, against
    hooks; --what calls: sequences of calls on a live model, against a model of its state; --what
    live: adapters of random settings on live models, against PEFT; --what images: image and video
    models as files, in GGUF and as pipelines)
"""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

from tests.fuzz import calls, damaged, images, jobs, live, models, sums

# what is run: a module with `run(kind, seed, folder)`, whose outcome has `unusable`, `wrong` and
# `refusals`, with `counts(outcome)`, and with `unjudged(outcome)`
WHAT = {"jobs": jobs, "live": live, "statistics": sums, "images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=[*WHAT, "damaged", "calls"], default="jobs")
    parser.add_argument("--kinds", default="all")
    parser.add_argument("--seeds", default="0-0")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9)
    options = parser.parse_args()
    every = images.KINDS if options.what == "images" else models.KINDS
    kinds = every if options.kinds == "all" else options.kinds.split(",")
    first, _, last = options.seeds.partition("-")
    if options.what == "damaged":
        print(dict(damaged.run_all(kinds, range(int(first), int(last or first) + 1))))
        return
    if options.what == "calls":
        counted, wrong = calls.run_all(range(int(first), int(last or first) + 1))
        print(*wrong, dict(counted), f"{len(wrong)} wrong", sep="\n")
        return
    what, counts = WHAT[options.what], collections.Counter()
    began = time.monotonic()
    for seed in range(int(first), int(last or first) + 1):
        for kind in kinds:
            if time.monotonic() - began > options.seconds:
                break
            with tempfile.TemporaryDirectory() as folder:
                outcome = what.run(kind, seed, Path(folder))
            counts["unusable" if outcome.unusable else options.what] += 1
            counts.update(what.counts(outcome))
            counts["refusals"] += len(outcome.refusals)
            counts["wrong"] += bool(outcome.wrong)
            odd = what.unjudged(outcome)
            if outcome.wrong or odd:
                texts = [
                    *outcome.wrong[:4],
                    *(f"REFUSED {verb}: {message}" for verb, message in odd[:3]),
                ]
                print(
                    f"{kind} {seed}: {len(outcome.wrong)} wrong, {len(odd)} refused",
                    *texts,
                    sep="\n   ",
                    flush=True,
                )
            if options.log:
                with options.log.open("a") as file:
                    file.write(json.dumps(vars(outcome), default=str) + "\n")
    print(dict(counts), f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
