"""The kill campaign: runs are killed at chosen file writes and at random times, resumed, and compared bit for bit with one that was not.

    python tests/kill/campaign.py --kills 200

A run whose kill came before its first checkpoint was whole is started anew, as its message says.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lab

CONFIGURATIONS = [(family, tuning) for family in lab.FAMILIES for tuning in lab.TUNINGS]


@dataclass
class Reference:
    """A run that nothing stopped: what it leaves, how many changes it makes below its folder, and how long it takes."""

    traces: dict[str, Any]
    writes: int
    seconds: float


def reference(folder: Path, family: str, tuning: str) -> Reference:
    """Run to the end, counting."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    train = lab.command("train", str(lab.config(folder, family, tuning)))
    done = lab.fork(lab.killed_at_write(train, None, folder / "count"), folder)
    assert done.code == 0, done.log
    return Reference(lab.traces(folder / "out"), int((folder / "count").read_text()), done.seconds)


def kill_and_resume(folder: Path, family: str, tuning: str, whole: Reference, *, write: int | None, seconds: float | None) -> tuple[str, str]:
    """Kill a run at a write or after some time, and finish it: how (`resumed`, `started anew`, `not killed`), and what is wrong or ""."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    path = str(lab.config(folder, family, tuning))
    train = lab.command("train", path)
    killed = lab.fork(lab.killed_at_write(train, write) if write else train, folder, seconds)
    if killed.code not in (0, -9):
        return "not killed", f"the run to be killed ended with exit code {killed.code}:\n{killed.log[-2000:]}"
    how = "resumed" if killed.code else "not killed"
    again = lab.fork(lab.command("train", path, "resume_from_checkpoint=true"), folder)
    if again.code == 2 and "holds no checkpoint that can be resumed" in again.log:
        how = "started anew"
        again = lab.fork(lab.command("train", path, "overwrite_output_dir=true"), folder)
    if again.code:
        return how, f"exit code {again.code}:\n{again.log[-2000:]}"
    found = lab.traces(folder / "out")
    return how, "; ".join(f"{name} differs: {found[name]} instead of {whole.traces[name]}" for name in found if found[name] != whole.traces[name])


def run(kills: int, seed: int, folder: Path, say: Any = print) -> tuple[Counter[str], list[str]]:
    """The campaign: how many kills went how, and what failed. Every second kill is at a write."""
    rng, counts, failures = random.Random(seed), Counter[str](), []
    wholes = {each: reference(folder, *each) for each in CONFIGURATIONS}
    while counts["killed"] < kills:
        number = counts["killed"]
        family, tuning = CONFIGURATIONS[number // 2 % len(CONFIGURATIONS)]
        whole = wholes[family, tuning]
        write = rng.randint(1, whole.writes) if number % 2 == 0 else None
        seconds = None if write else rng.uniform(0.3, 1) * whole.seconds  # before that nothing is written
        how, failure = kill_and_resume(folder, family, tuning, whole, write=write, seconds=seconds)
        counts[how] += 1
        if how != "not killed":  # it was faster than the run whose time was taken
            counts.update(["killed", f"{family} {tuning}", "at a write" if write else "at a time"])
            counts["bit-identical"] += not failure
        if failure:
            place = f"write {write} of {whole.writes}" if write else f"{seconds:.2f} of {whole.seconds:.2f} seconds"
            failures.append(f"{family} {tuning}, killed at {place}, {how}: {failure}")
            say(failures[-1])
    return counts, failures


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    given, begun = options.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lab.prepare(Path(folder))
        lab.make_folder(Path(folder))
        counts, failures = run(given.kills, given.seed, Path(folder))
    print(f"{given.kills} kills in {time.monotonic() - begun:.0f} seconds: {dict(counts)}; {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
