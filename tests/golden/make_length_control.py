"""Makes length_control.json: win rates and length-controlled win rates of invented annotations, by scipy and scikit-learn.

    python make_length_control.py --output length_control.json      (numpy, scipy, scikit-learn)

The regression is AlpacaEval 2's (arXiv 2404.04475), written down here a second time. Its optimum at a given C is found by scipy
(L-BFGS-B on the positive and negative parts of the weights, where the L1 penalty is linear; then the gradient's
equations) and, as a check of this file, by scikit-learn's liblinear, which the leaderboard uses. C is chosen by scikit-learn fits on five folds by position. The
intervals are percentiles over resampled rows, each refitted.
"""

import argparse
import json

import numpy as np
import scipy
import sklearn
from scipy.optimize import minimize, root
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression

GRID = np.logspace(-4, 4, 10)
REGULARISER_WEIGHT = 0.1


def deviations(lengths):
    delta = lengths[:, 0] - lengths[:, 1]
    return delta / delta.std(ddof=1)


class Case:
    """Annotations of a model, with the difficulties and regularisation rows of its form."""

    def __init__(self, name, lengths, preferences, difficulties=None, baselines=()):
        self.name, self.lengths, self.preferences = name, lengths, preferences
        self.difficulties, self.baselines = difficulties, baselines

    def difficulty(self, count):
        return np.zeros(count) if self.difficulties is None else self.difficulties[:count]

    def problem(self, rows):
        """Features [n, 3], targets [n] and weights [n] of the regularisation rows and the judged ones among `rows`."""
        lengths, preferences, difficulty = self.lengths[rows], self.preferences[rows], self.difficulty(len(self.lengths))[rows]
        features, targets, weights = [], [], []
        for _, of_lengths, wins in self.baselines:
            s = np.tanh(deviations(of_lengths))
            features.append(np.column_stack([s, self.difficulty(len(s)), np.zeros(len(s))]))
            targets.append(wins)
            weights.append(np.full(len(s), REGULARISER_WEIGHT))
        judged = ~np.isnan(preferences)
        s = np.tanh(deviations(lengths))  # scaled by all rows, judged or not
        features.append(np.column_stack([s, difficulty, np.ones(len(s))])[judged])
        targets.append(preferences[judged] - 1)
        weights.append(np.ones(judged.sum()))
        return np.concatenate(features), np.concatenate(targets), np.concatenate(weights)

    def rate(self, weights, rows):
        predicted = 100 * expit(weights[1] * self.difficulty(len(self.lengths))[rows] + weights[2])
        return predicted.mean(), predicted.std(ddof=1) / np.sqrt(len(predicted))


def optimum(problem, c):
    features, targets, weights = problem

    def slope(at):
        return features.T @ (weights * (expit(features @ at) - targets))

    def value(parts):
        at = parts[:3] - parts[3:]
        eta = features @ at
        loss = -(weights * (targets * log_expit(eta) + (1 - targets) * log_expit(-eta))).sum()
        return loss + parts.sum() / c, np.concatenate([slope(at), -slope(at)]) + 1 / c

    found = minimize(value, np.zeros(6), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 6)
    rough = found.x[:3] - found.x[3:]
    # Which weights are 0 is nearly known now; the others solve the gradient's equations to the last digit.
    signs = np.sign(rough) * (np.abs(rough) > 1e-6)
    for _ in range(10):
        at, free = np.zeros(3), signs != 0

        def equations(part):
            at[free] = part
            return (slope(at) + signs / c)[free]

        if free.any():
            at[free] = root(equations, rough[free], tol=1e-13).x
        wrong = free & (np.sign(at) != signs)
        missing = ~free & (np.abs(slope(at)) > 1 / c + 1e-9)
        if not wrong.any() and not missing.any():
            assert (np.abs(slope(at) + signs / c)[free] < 1e-7).all()
            return at
        signs = np.where(wrong, 0, np.where(missing, -np.sign(slope(at)), signs))
    raise ArithmeticError("no optimum found")


def liblinear(problem, c):
    """The leaderboard's way: every row twice, as a win and as a loss, weighted by how much it is either."""
    features, targets, weights = problem
    model = LogisticRegression(C=c, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=123, tol=1e-11, max_iter=200000)
    both = np.concatenate([weights * targets, weights * (1 - targets)])
    labels = np.repeat([1, 0], len(targets))
    model.fit(np.concatenate([features, features]), labels, sample_weight=both)
    return model.coef_[0]


def cross_validated(problem, c):
    scores = []
    for fold in range(5):
        held = np.arange(len(problem[1])) % 5 == fold
        features, targets, weights = (part[held] for part in problem)
        eta = features @ liblinear([part[~held] for part in problem], c)
        scores.append((weights * (targets * log_expit(eta) + (1 - targets) * log_expit(-eta))).mean())
    return np.mean(scores)


def figures(case, rng):
    rows = np.arange(len(case.lengths))
    problem = case.problem(rows)
    by_c = {}
    for c in GRID[2:]:
        weights = optimum(problem, c)
        other = liblinear(problem, c)
        assert np.abs(weights - other).max() < 1e-4, (case.name, c, weights, other)
        rate, error = case.rate(weights, rows)
        by_c[repr(float(c))] = {"length_controlled_winrate": rate, "lc_standard_error": error, "glm_weights": weights.tolist()}
    scores = [cross_validated(problem, c) for c in GRID]
    best = int(np.argmax(scores))
    assert sorted(scores)[-1] - sorted(scores)[-2] > 1e-7, "a choice that the solver's tolerance makes is no golden one"

    judged = case.preferences[~np.isnan(case.preferences)]
    draws = (judged == 1.5).sum()
    wins = (judged > 1.5).sum()
    resampled = []
    for _ in range(2000):
        drawn = rng.integers(0, len(rows), len(rows))
        weights = optimum(case.problem(drawn), GRID[best])
        resampled.append((100 * np.nanmean(case.preferences[drawn] - 1), case.rate(weights, drawn)[0]))
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return {
        "win_rate": 100 * (judged - 1).mean(),
        "standard_error": 100 * judged.std(ddof=1) / np.sqrt(len(judged)),
        "n_wins": int(wins),
        "n_wins_base": int((judged < 1.5).sum()),
        "n_draws": int(draws),
        "n_total": len(judged),
        "discrete_win_rate": 100 * (wins + draws / 2) / len(judged),
        "avg_length": int(case.lengths[:, 1].mean()),
        "by_c": by_c,
        "c": float(GRID[best]),
        "intervals": {"win_rate": [low[0], high[0]], "length_controlled": [low[1], high[1]]},
    }


def invent(rng, count, model, length, difficult, sharp):
    """Outputs and preferences of a model that is `model` better in log-odds, `length` times as long, and judged by length
    too; `sharp`: the judge says 1 or 2, else something between."""
    base = rng.lognormal(6.5, 0.6, count).round().clip(1)
    other = (base * length * rng.lognormal(0, 0.4, count)).round()
    lengths = np.column_stack([base, other])
    difficulties = (rng.normal(0, 1.4, count) * (np.arange(count) > 0)).round(4)
    eta = -1.1 * np.tanh(deviations(lengths)) + difficult * difficulties + model
    if sharp:
        return lengths, 1.0 + (rng.random(count) < expit(eta)), difficulties
    return lengths, (1 + expit(eta + rng.normal(0, 2.5, count))).round(4), difficulties


def baselines(rng, count):
    found = []
    for name, length in [("verbose", 1.6), ("concise", 0.5)]:
        lengths, preferences, _ = invent(rng, count, 0, length, 0.2, False)
        found.append((name, lengths, (preferences - 1).round(4)))
    return found


def cases(rng):
    lengths, preferences, difficulties = invent(rng, 150, -0.8, 1.5, 0.6, False)
    yield Case("longer and worse", lengths, preferences, difficulties, baselines(rng, 150))
    lengths, preferences, difficulties = invent(rng, 120, 0.9, 0.6, 0.3, True)
    yield Case("shorter and better, in words", lengths, preferences, difficulties, baselines(rng, 120))
    lengths, preferences, difficulties = invent(rng, 100, 0.2, 1.1, 0.5, False)
    preferences[rng.permutation(100)[:17]] = np.nan
    preferences[rng.permutation(100)[:9]] = 1.5
    yield Case("unjudged rows and draws", lengths, preferences, difficulties, baselines(rng, 100))
    lengths, preferences, difficulties = invent(rng, 90, -3.5, 1.0, 0.4, False)
    yield Case("nearly always worse, no baselines", lengths, preferences, difficulties)
    lengths, preferences, _ = invent(rng, 200, 0.3, 2.0, 0.0, True)
    yield Case("length only", lengths, preferences)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    rng = np.random.default_rng(7)
    plain = lambda values: [None if np.isnan(v) else (int(v) if v == int(v) else float(v)) for v in values]
    written = []
    for case in cases(rng):
        written.append({
            "name": case.name,
            "len_1": plain(case.lengths[:, 0]),
            "len_2": plain(case.lengths[:, 1]),
            "preference": plain(case.preferences),
            "difficulty": None if case.difficulties is None else plain(case.difficulties),
            "baselines": [{"variant": name, "len_1": plain(l[:, 0]), "len_2": plain(l[:, 1]), "preference": plain(wins)}
                          for name, l, wins in case.baselines],
            "expected": figures(case, rng),
        })
    versions = {"numpy": np.__version__, "scipy": scipy.__version__, "scikit-learn": sklearn.__version__}
    # A line a case: numbers enough to drown any diff.
    with open(args.output, "w", encoding="utf-8") as file:
        lines = ",\n".join(json.dumps(case, allow_nan=False) for case in written)
        file.write(f'{{"made_with": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
