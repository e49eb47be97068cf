"""Reads what `just sweep` measured: `choose DIR` prints the best point by the validation prompts, `table DIR` everything as
Markdown. The figure is the length-controlled win rate where there was a judge, else the accuracy of the implicit reward."""

import json
import sys
from pathlib import Path


def figure(row):
    """What is compared, higher is better: a rate in percent, and what breaks a tie."""
    if "accuracy" in row:
        return 100 * row["accuracy"]["value"], row["margin"]["value"]
    rate = row["length_controlled_winrate"]
    return row["win_rate"] if rate is None else rate, row["win_rate"]


def shown(row):
    """The figure with its 95% interval."""
    if "accuracy" in row:
        low, high = (100 * row["accuracy"][side] for side in ("low", "high"))
    else:
        low, high = row["length_controlled_low"], row["length_controlled_high"]
    interval = "" if low is None else f" ({low:.1f} … {high:.1f})"
    return f"{figure(row)[0]:.1f}{interval}"


def of_test(folder):
    with open(folder / "test.json") as file:
        return json.loads(file.readline())


def main(what, folder):
    folder = Path(folder)
    points = [json.loads(line) for line in open(folder / "sweep.jsonl")]
    # Of equals the first: the one nearer to no replay and no price.
    chosen = max(points, key=lambda point: figure(point["validation"]))
    if what == "choose":
        print(chosen["point"])
        return
    name = "accuracy" if "accuracy" in chosen["validation"] else "length-controlled win rate"
    print(f"# {len(points)} trainings of {chosen['steps']} steps: {name}, percent, with 95% intervals\n")
    print("| γ | α | validation | |")
    print("|---|---|---|---|")
    for point in points:
        mark = "chosen" if point is chosen else ""
        print(f"| {point['gamma']} | {point['alpha']:.3g} | {shown(point['validation'])} | {mark} |")
    test = of_test(folder / chosen["point"])
    print(f"\nγ = {chosen['gamma']}, α = {chosen['alpha']:.3g} on the test prompts, looked at once: {shown(test)}.")
    if (folder / "test.json").exists():
        print(f"The policy before: {shown(of_test(folder))}.")


main(*sys.argv[1:])
