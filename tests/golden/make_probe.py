"""Makes probe.npz: logistic regressions by scikit-learn.  Run by hand; no test runs it.

    pip install scikit-learn==1.9.1
    python tests/golden/make_probe.py

What is written: correlated `features` in float32 with a mean of their own, `labels`, and for each of `C` the `weights`,
`bias` and mean cross-entropy `loss` of `LogisticRegression(C=C, tol=1e-12)`, which has the same objective and solves it
in float64.
"""

import pathlib

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

FILE = pathlib.Path(__file__).parent / "probe.npz"
STRENGTHS = (1e-3, 1.0, 100.0)


def main() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 6, 150)
    centres, mix = generator.normal(size=(6, 10)), generator.normal(size=(10, 10)) * np.geomspace(1, 0.1, 10)
    features = ((centres[labels] + generator.normal(size=(150, 10))) @ mix.T + 4).astype(np.float32)
    wide = features.astype(np.float64)
    models = [LogisticRegression(C=C, tol=1e-12, max_iter=100_000).fit(wide, labels) for C in STRENGTHS]
    np.savez_compressed(
        FILE,
        features=features,
        labels=labels.astype(np.int8),
        C=np.array(STRENGTHS),
        weights=np.stack([model.coef_.T for model in models]),
        bias=np.stack([model.intercept_ for model in models]),
        loss=np.array([log_loss(labels, model.predict_proba(wide)) for model in models]),
    )


if __name__ == "__main__":
    main()
