"""What saving progress costs the main job: its time with and without, alternating in one process.

    python benchmarks/saving_cost.py

The job is `python train.py --method lpft --lora --ntk 100`, with the tiny encoder already cached. Without
means that StateFile.save and the fsync of every file do nothing. Prints the median of each and the ratio;
and the time of the saves themselves, which is less noisy.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plumbing import run_folder
import train


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="runs of each kind (default: %(default)s)")
    repeats = parser.parse_args().repeats
    save, fsync, inside = run_folder.StateFile.save, run_folder.os.fsync, []

    def timed_save(self, **parts):
        started = time.perf_counter()
        save(self, **parts)
        inside[-1].append(time.perf_counter() - started)

    def no_save(self, **parts):
        self.parts |= parts

    seconds = {True: [], False: []}
    for number in range(2 * repeats + 2):
        saving = number % 2 == 0
        run_folder.StateFile.save = timed_save if saving else no_save
        run_folder.os.fsync = fsync if saving else lambda handle: None
        inside.append([])
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()):
            started = time.perf_counter()
            train.main(["--lora", "--ntk", "100", "--out", str(Path(folder) / "run")])
            seconds[saving].append(time.perf_counter() - started)
    with_saving, without = (statistics.median(seconds[kind][1:]) for kind in (True, False))  # the first warms up
    saves = [times for times in inside[2:] if times]
    share = statistics.median(sum(times) / total for times, total in zip(saves, seconds[True][1:]))
    print(f"main job with saving {with_saving:.2f} s, without {without:.2f} s, ratio {with_saving / without:.3f}\n"
          f"{len(saves[0])} saves of {1e3 * statistics.median(sum(saves, [])):.1f} ms each: {100 * share:.2f} % of the "
          "time (median)")


if __name__ == "__main__":
    main()
