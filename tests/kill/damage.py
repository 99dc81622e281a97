"""The newest of two checkpoints is damaged, file by file and in five ways, and the run resumed: each damage is named, and the run ends with
the bits of one that nothing happened to.

    python tests/kill/damage.py            # every file, every damage
    python tests/kill/damage.py --every 5  # every fifth of them
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import lab


def _flip(path: Path) -> None:
    data = path.read_bytes()
    place = len(data) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "a byte flipped": _flip,
    "deleted": lambda path: path.unlink(),
    "replaced": lambda path: path.write_bytes(b"garbage " * 40),
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--every", type=int, default=1)
    every = options.parse_args().every
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lab.prepare(folder)
        lab.make_folder(folder)
        tried, failed = _damage_all(folder, every)
    print(f"{tried} damages, each named and recovered from, except {len(failed)}: {failed}")
    return 1 if failed else 0


def _damage_all(folder: Path, every: int) -> tuple[int, list[str]]:
    path = str(lab.config(folder, "select", "full", save_total_limit=None))
    done = lab.fork(lab.command("train", path), folder)
    assert done.code == 0, done.log
    whole, out, kept = lab.traces(folder / "out"), folder / "out", folder / "kept"
    for later in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(out / later)  # as if killed after step 4
    out.rename(kept)
    names = sorted(str(file.relative_to(kept / "checkpoint-4")) for file in (kept / "checkpoint-4").rglob("*") if file.is_file())
    cases = [(name, damage) for name in names for damage in DAMAGES][::every]
    failed = []
    for name, damage in cases:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)
        DAMAGES[damage](out / "checkpoint-4" / name)
        again = lab.fork(lab.command("train", path, "resume_from_checkpoint=true"), folder)
        named = "not resuming from a newer checkpoint" in again.log and Path(name).name in again.log
        if again.code or not named or lab.traces(out) != whole:
            failed.append(f"{name} {damage}: exit code {again.code}, {'named' if named else 'not named'}: {again.log[-500:]}")
    return len(cases), failed


if __name__ == "__main__":
    sys.exit(main())
