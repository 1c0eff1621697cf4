"""python -m tests.fuzz --seconds 60 --seed 0: fuzz for a while, print what fails as tests, and write the counts."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from tests.fuzz.campaign import Campaign, Options


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on; a night is 28800")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same graphs")
    parser.add_argument(
        "--start", type=int, default=0, help='the number of the first graph: "next" of an earlier report'
    )
    parser.add_argument("--graphs", type=float, default=float("inf"), help="stop after so many graphs")
    parser.add_argument("--quick", action="store_true", help="a few passes a graph in turn, as in CI")
    parser.add_argument("--report", type=Path, help="write the counts and failures here as JSON, after every bundle")
    given = parser.parse_args()
    _settle()
    quick = {"trace_every": 8, "passes": 4} if given.quick else {}
    campaign = Campaign(Options(seed=given.seed, **quick), done=given.start)
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:.0f} s] {text}", flush=True)
        if given.report:
            given.report.write_text(json.dumps(campaign.report(), indent=1))

    campaign.say = say
    try:
        campaign.run(given.seconds, given.graphs)
    except KeyboardInterrupt:
        say(f"stopped; go on with --seed {given.seed} --start {campaign.done}")
    if not given.report:
        print(json.dumps(campaign.report(), indent=1))
    return int(any(not f.reason for f in campaign.failures.values()))


def _settle() -> None:
    """One thread, no tuned kernels, and none of the warnings that odd calls give."""
    torch.set_num_threads(1)
    os.environ["SYLVESTER_TUNE"] = "0"
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


sys.exit(main())
